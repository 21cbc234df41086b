"""Text that a target writes itself: prompts from every domain, batches that are padded, parts that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.corpus import write_corpus
from recipes.sources import Document
from recipes.tokenizer import train_tokenizer
from specgym.decoding.errors import FitError
from specgym.decoding.fit.settings import TextSettings
from specgym.decoding.fit.text import target_text
from specgym.decoding.fit.text.prompts import JUDGING, SPEED, TRAINING, Prompts, cut_prompts, cut_windows, halves
from specgym.decoding.fit.text.target_text import TargetText, continue_rows, generate_text

SETTINGS = TextSettings(texts=10, prompt_tokens=8, new_tokens=6, temperature=0.0, generate_batch=4)


def words(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(["the", "spec", "draft", "token", "model", "of", "and"], 200))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([words(0)], 280)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    documents = {
        domain: [Document(f"{domain}/{i}", f"{domain}/{i}", f"{domain} {i} {words(i)}") for i in range(60)]
        for domain in ("prose", "code")
    }
    write_corpus(documents, tmp_path / "corpus", {domain: f"{domain}; free" for domain in documents})
    return tmp_path / "corpus"


def prompts_of(rows: Sequence[Sequence[int]]) -> Prompts:
    count = len(rows)
    zeros = np.zeros(count, dtype=np.int64)
    return Prompts([list(row) for row in rows], zeros, zeros, ("notes",), [], {}, {})


@pytest.fixture
def rows() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, 60, length).tolist() for length in (8, 4, 5, 8, 6, 7, 8, 4, 8, 5)]


def test_windows_lie_within_documents() -> None:
    tokens = np.array([*range(10, 30), 0, *range(30, 34), 0, *range(40, 60), 0])
    texts = cut_windows(tokens, 20, 8, 0, np.random.default_rng(0))
    assert all(4 <= len(row) <= 8 and np.diff(row).tolist() == [1] * (len(row) - 1) for row in texts)
    assert len({tuple(row) for row in texts}) > 10
    with pytest.raises(FitError, match=r"26 places for prompts of 8 tokens within a document, and 27 are needed"):
        cut_windows(tokens, 27, 8, 0, np.random.default_rng(0))


def test_prompts_cover_every_domain_and_those_kept_apart_come_from_other_documents(
    corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = cut_prompts(tokenizer, corpus, (), 80, 12, 0)
    assert prompts.domains == ("code", "prose")
    for place in (0, 1):
        counts = [
            int(((prompts.domain == place) & (prompts.side == side)).sum()) for side in (TRAINING, JUDGING, SPEED)
        ]
        assert counts == [36, 2, 2]
    assert set(prompts.held_out) == {"code", "prose"}
    held_out = str(tokenizer.decode(prompts.held_out["prose"]))
    documents = (corpus / "prose.jsonl").read_text().splitlines()
    assert all((json.loads(line)["text"] in held_out) == (json.loads(line)["split"] != "train") for line in documents)
    for row, domain, side in zip(prompts.rows, prompts.domain, prompts.side, strict=True):
        if domain == 1:
            split = "train" if side == TRAINING else "held-out"
            passage = str(tokenizer.decode(row))
            assert any(passage in document and f'"split": "{split}"' in document for document in documents)
    with pytest.raises(FitError, match="--texts 7 is too few for 2 domains"):
        cut_prompts(tokenizer, corpus, (), 7, 12, 0)


def test_no_document_that_heads_are_judged_on_is_one_whose_speed_is_measured(
    corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = cut_prompts(tokenizer, corpus, (), 400, 60, 0)
    places = dict[int, set[int]]()
    for side in (JUDGING, SPEED):
        chosen = np.flatnonzero((prompts.side == side) & (prompts.domain == 0))
        assert len(chosen) == 10
        places[side] = {document_of(prompts.held_out["code"], prompts.rows[row]) for row in chosen}
    assert not places[JUDGING] & places[SPEED]


def document_of(tokens: np.ndarray, row: list[int]) -> int:
    """Which document, counted from 0, a passage is from that occurs once."""
    views = np.lib.stride_tricks.sliding_window_view(tokens, len(row))
    (start,) = np.flatnonzero((views == row).all(1))
    return int((tokens[:start] == tokens[-1]).sum())


def test_documents_go_by_turns_into_two_halves_and_a_few_are_cut_in_the_middle() -> None:
    first, second = halves(np.array([5, 0, 6, 6, 0, 7, 0, 8, 0, 9, 9, 0]), 0)
    assert first.tolist() == [5, 0, 7, 0, 9, 9, 0]
    assert second.tolist() == [6, 6, 0, 8, 0]
    first, second = halves(np.array([5, 6, 7, 8, 9, 0]), 0)
    assert (first.tolist(), second.tolist()) == ([5, 6, 7], [8, 9, 0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_batch_of_unequal_prompts_is_continued_as_each_alone(
    make_model: Callable[..., PreTrainedModel], rows: list[list[int]], family: str
) -> None:
    model = make_model(family).eval()
    together = continue_rows(model, rows, (), SETTINGS, 0)
    alone = [continue_rows(model, [row], (), SETTINGS, 0)[0] for row in rows]
    assert together == alone
    assert [len(row) for row in together] == [len(row) + 6 for row in rows]


def test_nothing_follows_the_end_of_a_text(make_model: Callable[..., PreTrainedModel], rows: list[list[int]]) -> None:
    model = make_model("llama").eval()
    endless = continue_rows(model, rows, (), SETTINGS, 0)
    end = endless[0][-3]
    texts = continue_rows(model, rows, (end,), SETTINGS, 0)
    for row, whole, cut in zip(rows, endless, texts, strict=True):
        written = whole[len(row) :]
        last = written.index(end) + 1 if end in written else len(written)
        assert cut == whole[: len(row) + last]
    assert len(texts[0]) < len(endless[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("default", ["min_p", "suppress_tokens", "eos_token_id", "num_beams", "stop_strings"])
def test_defaults_of_the_target_do_not_bend_its_text(
    make_model: Callable[..., PreTrainedModel], rows: list[list[int]], default: str, temperature: float
) -> None:
    model = make_model("llama", spread=0.1).eval()
    settings = replace(SETTINGS, temperature=temperature)
    plain = continue_rows(model, rows, (), settings, 0)
    written = [token for row, whole in zip(rows, plain, strict=True) for token in whole[len(row) :]]
    values = {"min_p": 0.99, "suppress_tokens": written, "eos_token_id": written, "num_beams": 4, "stop_strings": "a"}
    defaults = GenerationConfig(**{default: values[default]})
    model.generation_config = defaults
    assert continue_rows(model, rows, (), settings, 0) == plain
    assert model.generation_config is defaults


def generated(model: PreTrainedModel, rows: list[list[int]], work: Path, **changed: Any) -> TargetText:
    return generate_text(model, (), prompts_of(rows), replace(SETTINGS, temperature=1.0, **changed), 0, work)


def test_a_killed_run_goes_on_and_ends_with_the_same_text_which_is_then_used_again(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama").eval()
    whole = generated(model, rows, tmp_path / "whole")
    calls = list[int]()

    def counted(*arguments: Any) -> list[list[int]]:
        if len(calls) == 2:
            calls.append(-1)
            raise KeyboardInterrupt
        calls.append(len(arguments[1]))
        return continue_rows(*arguments)

    monkeypatch.setattr(target_text, "continue_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        generated(model, rows, tmp_path / "parts")
    resumed = generated(model, rows, tmp_path / "parts")
    assert calls == [4, 4, -1, 2]
    np.testing.assert_array_equal(resumed.tokens, whole.tokens)
    np.testing.assert_array_equal(resumed.ends, whole.ends)
    again = generated(model, rows, tmp_path / "parts")
    assert len(calls) == 4
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    assert not list((tmp_path / "parts").rglob("*.tmp"))


def test_text_depends_on_target_settings_and_prompts(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], rows: list[list[int]]
) -> None:
    model = make_model("llama").eval()
    digests = {generated(model, rows, tmp_path).digest}
    digests.add(generated(model, rows, tmp_path, new_tokens=5).digest)
    digests.add(generated(model, [*rows[:-1], [1, 2, 3, 4]], tmp_path).digest)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    digests.add(generated(model, rows, tmp_path).digest)
    assert len(digests) == 4


def test_a_damaged_part_is_named(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], rows: list[list[int]]
) -> None:
    model = make_model("llama").eval()
    part = generated(model, rows, tmp_path).folder / "part-00001.npz"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(FitError, match=r"part-00001\.npz is damaged .*remove it"):
        generated(model, rows, tmp_path)
