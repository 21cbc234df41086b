"""Further text for drafts: windows that the target reads, and prompts of sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specgym.decoding.errors import FitError
from specgym.decoding.fit.draft import distil
from specgym.decoding.fit.draft.distil import DraftSettings, MoreTextSettings, make_draft
from specgym.decoding.fit.settings import LoopSettings, TextSettings
from specgym.decoding.fit.text.prompts import JUDGING, TRAINING, Prompts, set_prompts
from specgym.decoding.fit.text.states import HiddenStates, hidden_states, join_states, whole_states
from specgym.decoding.fit.text.target_text import join_texts, plain_windows
from specgym.decoding.prompts import PromptFileError, load_prompts

MakeModel = Callable[..., PreTrainedModel]
TEMPLATE = "{% for message in messages %}<u>{{ message['content'] }}</u>{% endfor %}"


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    sides = {"train": [f"the model {n}" for n in range(20)], "test": [f"a token {n}" for n in range(5)]}
    (tmp_path / "mine.json").write_text(json.dumps({**sides, "chat": True, "source": "me", "licence": "CC0"}))
    return tmp_path / "mine.json"


def documents(seed: int = 0) -> Prompts:
    """Two domains, whose tokens are different numbers; no prompts."""
    rng = np.random.default_rng(seed)
    trained = {"a": rng.integers(0, 40, 100).astype(np.int32), "b": rng.integers(40, 96, 70).astype(np.int32)}
    none = np.empty(0, dtype=np.int64)
    return Prompts([], none, none, ("a", "b"), [], {}, trained)


def test_plain_texts_are_windows_of_every_domain_and_never_overlap(make_model: MakeModel, tmp_path: Path) -> None:
    model, prompts = make_model("llama"), documents()
    text = plain_windows(model, prompts, 13, 10, 0, tmp_path)
    assert np.bincount(text.domain).tolist() == [7, 6]
    assert set(text.side.tolist()) == {TRAINING}
    starts = []
    for row, domain in zip(text.tokens, text.domain, strict=True):
        tokens = prompts.trained["ab"[domain]]
        starts.append((int(domain), [n for n in range(len(tokens) - 9) if (tokens[n : n + 10] == row).all()]))
    assert all(len(places) == 1 and places[0] % 10 == 0 for _, places in starts)
    assert len({(domain, *places) for domain, places in starts}) == 13
    np.testing.assert_array_equal(np.sort(text.written()), np.sort(text.tokens.ravel()))
    again, other = (plain_windows(model, prompts, 13, 10, seed, tmp_path) for seed in (0, 1))
    assert again.digest == text.digest != other.digest
    with pytest.raises(FitError, match=r"the text has 7 windows of 10 tokens in b, and 8 are needed: .*--plain-texts"):
        plain_windows(model, prompts, 16, 10, 0, tmp_path)


def test_each_prompt_for_training_comes_so_often_and_some_are_kept_apart(
    prompt_file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = set_prompts((str(prompt_file), "code"), 3, tokenizer, 1000, 0)
    assert prompts.domains == ("mine prompts", "code prompts")
    assert "mine prompts: 20 for training, me; licence CC0" in prompts.sources
    for place, name in enumerate((str(prompt_file), "code")):
        mine = [tuple(prompts.rows[n]) for n in np.flatnonzero(prompts.domain == place)]
        train = load_prompts(name).train
        expected = {tuple(tokenizer(text)["input_ids"]) for text in train}
        assert set(mine) == expected  # and none of those for testing
        assert all(mine.count(row) == 3 for row in expected)
        of_side = [
            {tuple(prompts.rows[n]) for n in np.flatnonzero((prompts.domain == place) & (prompts.side == side))}
            for side in (TRAINING, JUDGING)
        ]
        assert not of_side[0] & of_side[1]
        assert len(of_side[1]) == round(len(expected) / 10)


def test_prompts_of_chat_go_through_the_template(
    prompt_file: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    prompts = set_prompts((str(prompt_file),), 1, tokenizer, 1000, 0)
    assert all(str(tokenizer.decode(row)).startswith("<u>the model") for row in prompts.rows)


def test_prompt_sets_that_cannot_be_used_are_refused(
    prompt_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def ask(*names: str, room: int = 1000) -> None:
        set_prompts(names, 8, tokenizer, room, 0)

    with pytest.raises(FitError, match=r"train\[\d+\] has \d+ tokens, and the target has room for 2 .*fewer --new-tok"):
        ask(str(prompt_file), room=2)
    with pytest.raises(FitError, match="two of the prompt sets are called 'mine'"):
        ask(str(prompt_file), str(prompt_file))
    with pytest.raises(PromptFileError, match="no prompt set 'cod'"):
        ask("cod")
    (tmp_path / "one.json").write_text(json.dumps({"train": ["a"], "test": ["b"]}))
    with pytest.raises(FitError, match="has 1 prompt for training, and one is held out: give more"):
        ask(str(tmp_path / "one.json"))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_states_of_a_whole_text_are_those_of_the_target(
    make_model: MakeModel, tmp_path: Path, bfloat16: bool
) -> None:
    model = make_model("llama")
    text = plain_windows(model, documents(), 5, 10, 0, tmp_path)
    states = whole_states(model, text, bfloat16, batch=2)
    assert len(states) == 50
    with torch.no_grad():
        expected = model(torch.from_numpy(text.tokens.astype(np.int64)), output_hidden_states=True).hidden_states[-1]
    error = (states.hidden(np.arange(50)).float().view(5, 10, -1) - expected).abs()
    assert bool((error.mean() > 1e-3).item()) is bfloat16  # states are kept in float16 either way
    assert error.mean() < 0.1


def test_joined_states_are_those_of_each_part(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    short, long = (plain_windows(model, documents(width), 5, width, 0, tmp_path) for width in (6, 9))
    long = replace(long, prompts=np.full(5, 4, dtype=np.int64), domains=("b", "c"), side=np.array([0, 1, 0, 2, 0]))
    parts = [whole_states(model, short, False), hidden_states(model, long)]
    joined = join_states(parts)
    assert len(joined) == len(parts[0]) + len(parts[1])
    assert joined.text.tokens.shape == (10, 9)
    assert joined.text.domains == ("a", "b", "c")
    assert joined.text.domain.tolist() == [*short.domain, *(long.domain + 1)]
    mixed = np.random.default_rng(0).permutation(len(joined))
    expected = torch.cat([part.hidden(np.arange(len(part))) for part in parts])
    assert torch.equal(joined.hidden(mixed), expected[torch.from_numpy(mixed)])
    second = np.arange(len(parts[0]), len(joined))
    assert torch.equal(joined.labels(second, 2), parts[1].labels(np.arange(len(parts[1])), 2))
    assert sorted(joined.text.written()) == sorted([*short.written(), *long.written()])
    assert join_states(parts[:1]) is parts[0]
    assert join_texts([short, long]).digest != join_texts([long, short]).digest


# The command


@pytest.fixture
def settings(tmp_path: Path, counting_folder: Path) -> DraftSettings:
    return DraftSettings(
        target=str(counting_folder / "target"),
        out=tmp_path / "draft",
        text=(tmp_path / "notes.txt",),
        own_text=True,
        writing=TextSettings(texts=40, prompt_tokens=6, new_tokens=16, generate_batch=40),
        loop=LoopSettings(tokens=4 * 22, batch=4, bfloat16=False, device="cpu", work=tmp_path / "work"),
    )


def test_a_draft_learns_from_all_of_it_and_its_card_says_so(settings: DraftSettings, prompt_file: Path) -> None:
    make_draft(settings)
    before = {path.name for path in settings.loop.work.glob("text-*")}
    assert len(before) == 1
    more = MoreTextSettings(plain_texts=30, prompt_sets=(str(prompt_file),), continuations=2)
    qualities = make_draft(replace(settings, out=settings.out.with_name("more"), more_text=more))
    assert set(qualities) == {"notes", "mine prompts"}
    assert qualities["mine prompts"].tokens <= 2 * 2 * 16  # two prompts were kept apart
    names = {path.name for path in settings.loop.work.glob("text-*")}
    assert before < names  # the text after windows is the same text as without
    assert len(names) == 2
    card = (settings.out.with_name("more") / "README.md").read_text()
    assert "- mine prompts: 20 for training, me; licence CC0" in card
    assert "- target read 30 windows of 22 tokens of the same documents" in card
    assert "- target answered each of these prompts by at most 16 tokens, those of prompt sets 2 times" in card
    assert str(prompt_file.parent) not in card


def test_a_draft_learns_from_chats_that_the_target_begins_itself(
    settings: DraftSettings,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = TEMPLATE.replace("</u>", "<|end|> ")
    monkeypatch.setattr(tokenizer, "chat_template", ended.replace("<|end|>", str(tokenizer.eos_token)))
    target: Any = make_model("llama", vocabulary=len(tokenizer), spread=0.05, context=64)
    letters = torch.full((len(tokenizer),), -20.0)
    letters[[tokenizer.eos_token_id, *(tokenizer.get_vocab()[letter] for letter in "abcdefgh")]] = 0.0
    target.lm_head.bias = nn.Parameter(letters)
    target.name_or_path = "someone/model"
    monkeypatch.setattr(distil, "load_model", lambda *_, **__: (target, tokenizer))
    kept, real = list[HiddenStates](), distil.own_text_objective

    def own_objective(*arguments: Any) -> Any:
        kept.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr(distil, "own_text_objective", own_objective)
    more = MoreTextSettings(
        prompt_sets=(str(prompt_file),), continuations=2, own_prompts=64, own_prompt_tokens=20, answer_tokens=9
    )
    qualities = make_draft(replace(settings, hidden=32, more_text=more))
    assert set(qualities) == {"notes", "own chat prompts", "mine prompts"}
    text = kept[0].text
    chats = np.flatnonzero(text.domain == 1)
    messages = [str(tokenizer.decode(text.tokens[n, : text.prompts[n]])) for n in chats]
    assert len(set(messages)) == len(messages) >= 8
    assert all(message.startswith("<u>") and str(tokenizer.eos_token) in message for message in messages)
    written = text.ends - text.prompts
    assert written[chats].max() == written[text.domain == 2].max() == 9 < written[text.domain == 0].max()
    card = (settings.out / "README.md").read_text()
    assert "- own chat prompts: target itself began 64 messages of a user, of at most 20 tokens" in card
    assert "- target answered each of these prompts by at most 9 tokens, those of prompt sets 2 times" in card


def test_plain_texts_count_in_the_vocabulary_and_in_what_is_trained_on(
    settings: DraftSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def own_objective(model: PreTrainedModel, *arguments: Any) -> Any:
        kept.append((model, arguments[1]))
        return real(model, *arguments)

    real = distil.own_text_objective
    monkeypatch.setattr(distil, "own_text_objective", own_objective)
    for count in (0, 30):
        out = settings.out.with_name(f"with-{count}")
        make_draft(replace(settings, out=out, vocabulary=20, more_text=MoreTextSettings(plain_texts=count)))
    (without, less), (with_plain, more) = kept
    assert len(more) == len(less) + 30 * 22
    # The target counts in a circle; the text does not, so that its tokens appear with the plain texts alone.
    plain = set(more.text.tokens[-30:].ravel().tolist())
    tokens = [set(model.get_output_embeddings().tokens.tolist()) for model in (without, with_plain)]
    assert len(tokens[1] & plain) > len(tokens[0] & plain)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"more_text": MoreTextSettings(plain_texts=-1)}, "--plain-texts must be a whole number of at least 0, got -1"),
        (
            {"more_text": MoreTextSettings(continuations=0)},
            "--continuations must be a whole number of at least 1, got 0",
        ),
        (
            {"more_text": MoreTextSettings(plain_texts=1), "own_text": False},
            "add to text that the target writes: give --own",
        ),
        (
            {"more_text": MoreTextSettings(prompt_sets=("chat",)), "own_text": False},
            "text that the target writes: give --own",
        ),
        (
            {"more_text": MoreTextSettings(own_prompts=1), "own_text": False},
            "--own-prompts add to text that the target writes: give --own",
        ),
        ({"more_text": MoreTextSettings(own_prompts=9)}, "has no chat template"),
        ({"more_text": MoreTextSettings(own_prompts=-1)}, "--own-prompts must be a whole number of at least 0, got -1"),
        ({"more_text": MoreTextSettings(answer_tokens=1)}, "--answer-tokens must be .* at least 2, got 1"),
        ({"more_text": MoreTextSettings(prompt_sets=("code",), answer_tokens=9)}, "for 55 before --answer-tokens"),
        ({"more_text": MoreTextSettings(plain_texts=10**6)}, "are needed: give more text or fewer --plain-texts"),
        ({"more_text": MoreTextSettings(prompt_sets=("code",))}, "the target has room for 48 before --new-tokens"),
        ({"store": "int8", "share": False}, "--no-share is, do not read --store int8"),
        ({"intermediate": 4, "hidden": 32}, "--intermediate narrows layers taken .* leave one out"),
        ({"intermediate": 9}, "--intermediate must be 1 to 8, .* got 9"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_computed(
    settings: DraftSettings, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("something was computed")

    for name in ("generate_text", "hidden_states", "whole_states"):
        monkeypatch.setattr(distil, name, refused)
    with pytest.raises(FitError, match=message):
        make_draft(replace(settings, **changed))
