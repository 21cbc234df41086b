"""Tokens of prompts: in a chat template or not, whole or cut."""

import os
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specgym.decoding.errors import PromptError
from specgym.decoding.loading.find_model import load_tokenizer
from specgym.decoding.loading.prompt_tokens import default_prompt_tokens, encode, prompts_limited
from specgym.decoding.prompts import PromptSet, load_prompts, shipped_prompts


def _set(train: tuple[str, ...] = ("a",), test: tuple[str, ...] = ("b",), chat: bool = False) -> PromptSet:
    return PromptSet("made", train, test, source="here", licence="CC0-1.0", chat=chat)


def _tokenizer(template: str | None = None, bos: bool = False, before: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<s>", "user", "assistant", *"abcdef"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if before := ("<s>",) if bos else before:
        single = " ".join([*before, "$A"])
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(word, words[word]) for word in before]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


_TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content }}{% endfor %}{{ ' assistant' }}"


def test_prompts_become_token_ids_in_order() -> None:
    prompts = _set(train=("a b", "c"), test=("d",))
    assert encode(prompts, "train", _tokenizer(), max_tokens=8) == [[3, 4], [5]]
    assert encode(prompts, "test", _tokenizer(), max_tokens=8) == [[6]]


def test_a_chat_set_goes_through_the_chat_template() -> None:
    assert encode(_set(("a b",), chat=True), "train", _tokenizer(_TEMPLATE), max_tokens=8) == [[1, 3, 4, 2]]


@pytest.mark.parametrize(("chat", "template"), [(True, None), (False, _TEMPLATE)])
def test_without_a_template_or_a_chat_the_prompt_is_plain_text(chat: bool, template: str | None) -> None:
    assert encode(_set(("a b",), chat=chat), "train", _tokenizer(template), max_tokens=8) == [[3, 4]]


def test_a_long_prompt_loses_its_beginning() -> None:
    assert encode(_set(("a b c d e f",)), "train", _tokenizer(), max_tokens=2) == [[7, 8]]


def test_a_long_prompt_keeps_its_bos_token() -> None:
    assert encode(_set(("a b c d e f",)), "train", _tokenizer(bos=True), max_tokens=3) == [[0, 7, 8]]
    assert encode(_set(("a",)), "train", _tokenizer(bos=True), max_tokens=3) == [[0, 3]]


def test_a_prompt_without_tokens_is_refused_by_name() -> None:
    blank = _set(train=("a", "\u200b"))
    tokenizer = _tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\u200b", "removed")
    with pytest.raises(PromptError, match=r"'made': train\[1\].*no tokens"):
        encode(blank, "train", tokenizer, max_tokens=8)


def test_max_tokens_must_leave_room() -> None:
    with pytest.raises(ValueError, match="max_tokens must be a whole number of at least 2, got 1"):
        encode(_set(), "train", _tokenizer(), max_tokens=1)


def test_everything_that_the_tokenizer_puts_before_a_text_stays() -> None:
    tokenizer = _tokenizer(before=("<s>", "user"))
    assert encode(_set(("a b c d e f",)), "train", tokenizer, max_tokens=4) == [[0, 1, 7, 8]]
    assert encode(_set(("a b c d e f",)), "train", tokenizer) == [[0, 1, 3, 4, 5, 6, 7, 8]]


def _letters(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of characters, by their code points."""
    backend = Tokenizer(models.WordLevel({chr(place): place for place in range(32, 127)} | {"?": 63}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.chat_template = template
    return tokenizer


_TURNS = "[system: be brief]{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}[assistant:"
_AROUND = len("[system: be brief][user: ][assistant:")


@pytest.mark.parametrize("room", [1, 2, 7, 20])
def test_a_long_message_loses_its_middle_and_none_of_the_template(room: int) -> None:
    message = "Summarise this: " + "x" * 50 + " - in one line!"
    (ids,) = encode(_set((message,), chat=True), "train", _letters(_TURNS), _AROUND + room)
    first = (room + 1) // 2
    kept = message[:first] + message[len(message) - room + first :]
    assert "".join(map(chr, ids)) == f"[system: be brief][user: {kept}][assistant:"


def test_a_message_is_whole_where_it_fits() -> None:
    (ids,) = encode(_set(("Why?",), chat=True), "train", _letters(_TURNS), _AROUND + 4)
    assert "".join(map(chr, ids)).endswith("[user: Why?][assistant:")


def test_a_template_without_room_for_a_message_is_refused_with_its_length() -> None:
    with pytest.raises(
        PromptError, match=rf"train\[0\] \('Why\?'\) has {_AROUND + 4} tokens and may have {_AROUND}, which"
    ):
        encode(_set(("Why?",), chat=True), "train", _letters(_TURNS), _AROUND)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role required') }}", "System role required"),
        ("{{ messages[1].content }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_raises_is_named_with_its_reason_and_the_way_out(template: str, reason: str) -> None:
    with pytest.raises(PromptError, match=rf"'made': train\[0\].*{reason}.*chat=False.*tokenizer"):
        encode(_set(chat=True), "train", _letters(template))


def test_a_template_that_drops_the_message_is_refused() -> None:
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}go"
    with pytest.raises(PromptError, match=r"writes the same for every message.*chat=False"):
        encode(_set(("a", "b"), ("c",), chat=True), "train", _letters(parts))


@pytest.mark.parametrize("name", shipped_prompts())
def test_no_shipped_prompt_is_longer_than_what_earlier_versions_kept(name: str, shipped_tokenizer: Any) -> None:
    prompts = load_prompts(name)
    assert max(len(ids) for split in ("train", "test") for ids in encode(prompts, split, shipped_tokenizer)) < 128


@pytest.fixture(scope="module")
def shipped_tokenizer() -> Any:
    """The tokenizer that the shipped targets share."""
    return load_tokenizer("tiny-10m")


def test_a_limit_holds_until_its_end_and_in_processes_started_meanwhile() -> None:
    before = dict(os.environ)
    with prompts_limited(9), prompts_limited(7):
        assert default_prompt_tokens() == 7
        assert dict(os.environ) != before
    assert default_prompt_tokens() is None
    assert dict(os.environ) == before
    with pytest.raises(PromptError, match="at least 2, got 1"), prompts_limited(1):
        pass


def test_a_source_keeps_its_beginning_and_the_token_that_ends_it() -> None:
    prompts = _set(("Turn off the light in the kitchen and in the hall", "Open"), ("Close",))
    tokenizer = load_tokenizer("tiny-translator")
    whole, short = encode(prompts, "train", tokenizer), encode(prompts, "train", tokenizer, 6)
    assert short == [[*whole[0][:5], tokenizer.eos_token_id], whole[1]]
    assert len(whole[0]) > 6
