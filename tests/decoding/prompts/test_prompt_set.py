"""Prompt sets: shipped and from files; their split; their tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specgym.decoding import prompts as prompts_module
from specgym.decoding.errors import PromptError
from specgym.decoding.prompts import PromptFileError, PromptSet, encode, load_prompts, shipped_prompts

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file; returns its path."""

    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return write


def _set(train: tuple[str, ...] = ("a",), test: tuple[str, ...] = ("b",), chat: bool = False) -> PromptSet:
    return PromptSet("made", train, test, source="here", licence="CC0-1.0", chat=chat)


# Shipped sets


@pytest.mark.parametrize("name", shipped_prompts())
def test_every_shipped_set_is_complete(name: str) -> None:
    shipped = load_prompts(name)
    assert shipped.name == name
    assert len(shipped.train) >= 32
    assert len(shipped.test) >= 24
    assert shipped.source
    assert shipped.licence not in ("", "unknown")


def test_the_chat_set_is_large_enough_and_marked_as_chat() -> None:
    chat = load_prompts("chat")
    assert chat.chat
    assert len(chat.train) >= 40
    assert len(chat.test) >= 32


def test_a_limit_keeps_the_first_prompts_of_each_split() -> None:
    whole, few = load_prompts("chat"), load_prompts("chat", limit=3)
    assert (few.train, few.test) == (whole.train[:3], whole.test[:3])
    with pytest.raises(ValueError, match="limit=0"):
        load_prompts("chat", limit=0)


def test_an_unknown_name_lists_the_known_ones_and_a_close_one() -> None:
    with pytest.raises(PromptFileError, match=r"Did you mean 'chat'.*lambada.*\.jsonl"):
        load_prompts("chatt")


# The set itself


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [
        ((), ("b",), "no train prompts"),
        (("a",), (), "no test prompts"),
        (("a", " "), ("b",), r"train\[1\] is blank"),
        (("a",), ("b", "a"), r"test\[1\] repeats train\[0\]"),
        (("a",), (" a\n",), r"test\[0\] repeats train\[0\]"),
        (("a", "a"), ("b",), r"train\[1\] repeats train\[0\]"),
    ],
)
def test_a_set_refuses_what_would_spoil_a_comparison(train: Any, test: Any, reason: str) -> None:
    with pytest.raises(PromptFileError, match=f"'made'.*{reason}"):
        _set(train, test)


def test_a_split_has_one_of_two_names() -> None:
    with pytest.raises(ValueError, match="'train' or 'test'"):
        _set().split("validation")


def test_the_digest_depends_on_the_contents_only() -> None:
    base = _set().digest
    assert base == PromptSet("other", ("a",), ("b",), "elsewhere", "MIT").digest
    others = {_set(("b",), ("a",)).digest, _set(("a", "c")).digest, _set(chat=True).digest, _set(("ä",)).digest}
    assert len({base, *others}) == 5


# Files


def test_a_text_file_has_one_prompt_a_line(write: Write) -> None:
    result = load_prompts(write("mine.txt", "one\ntwo\n three \nfour\n"))
    assert {*result.train, *result.test} == {"one", "two", "three", "four"}
    assert not result.chat


def test_a_text_file_with_blank_lines_has_one_prompt_a_paragraph(write: Write) -> None:
    result = load_prompts(write("mine.txt", "\n\none\nstill one\n \n\ntwo\n"))
    assert {*result.train, *result.test} == {"one\nstill one", "two"}


def test_a_jsonl_file_has_one_object_a_line(write: Write) -> None:
    path = write("mine.jsonl", '{"prompt": "one", "id": 1}\n\n"two"\n{"prompt": "thr\\u00e9e"}\n')
    result = load_prompts(path, chat=True)
    assert {*result.train, *result.test} == {"one", "two", "thrée"}
    assert result.chat


def test_a_json_list_and_the_same_jsonl_are_the_same_set(write: Write) -> None:
    texts = [f"prompt {number}" for number in range(9)]
    as_list = load_prompts(write("a.json", json.dumps([{"prompt": text} for text in texts])))
    as_lines = load_prompts(write("b.jsonl", "\n".join(json.dumps(text) for text in texts)))
    assert as_list.digest == as_lines.digest


def test_a_json_file_with_splits_keeps_them(write: Write) -> None:
    value = {"train": ["a", "b"], "test": [{"prompt": "c"}], "chat": True, "source": "me", "licence": "MIT"}
    result = load_prompts(write("mine.json", json.dumps(value)))
    assert (result.train, result.test, result.chat, result.source, result.licence) == (
        ("a", "b"),
        ("c",),
        True,
        "me",
        "MIT",
    )
    assert not load_prompts(write("mine.json", json.dumps(value)), chat=False).chat


def test_a_file_is_never_hidden_by_a_shipped_set(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("chat.json", '["x", "y"]')
    monkeypatch.chdir(tmp_path)
    assert {*load_prompts("chat.json").train, *load_prompts("chat.json").test} == {"x", "y"}
    assert len(load_prompts("chat").train) >= 40


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '"text"', "a string"),
        ("a.json", "[1, 2]", "prompt 1 is a int"),
        ("a.json", '{"tokenizer": {}}', 'no list "train"'),
        ("a.json", '{"train": ["a"], "test": "b"}', 'no list "test"'),
        ("a.json", '{"train": ["a"], "test": [null]}', r"test\[0\] is missing or null"),
        ("a.json", '{"train": ["a"], "test": ["b"], "chat": "yes"}', '"chat" is a string'),
        ("a.jsonl", '{"prompt": "a"}\nb\n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "prompt 2 is missing or null"),
        ("a.txt", "only one\nonly one\n", "1 different prompts"),
        ("a.txt", "\n", "0 different prompts"),
    ],
)
def test_a_corrupt_or_foreign_file_is_refused_by_name(write: Write, name: str, content: str, reason: str) -> None:
    with pytest.raises(PromptFileError, match=rf"{name}.*{reason}"):
        load_prompts(write(name, content))


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptFileError, match=r"a\.txt cannot be read as UTF-8"):
        load_prompts(str(tmp_path / "a.txt"))
    with pytest.raises(PromptFileError, match=r"no prompt file .*b\.txt"):
        load_prompts(str(tmp_path / "b.txt"))


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, unique_by=str.strip, max_size=40))
def test_a_division_is_complete_disjoint_and_blind_to_the_order(texts: list[str]) -> None:
    train, test = prompts_module._divide(texts, "x")
    assert sorted(train + test) == sorted(texts)
    assert not set(train) & set(test)
    assert train
    assert test
    assert set(prompts_module._divide(texts[::-1], "x")[1]) == set(test)


def test_a_quarter_is_for_testing() -> None:
    assert len(prompts_module._divide([str(number) for number in range(100)], "x")[1]) == 25


# Tokens


def _tokenizer(template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<s>", "user", "assistant", *"abcdef"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
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
    with pytest.raises(ValueError, match="max_tokens=1"):
        encode(_set(), "train", _tokenizer(), max_tokens=1)
