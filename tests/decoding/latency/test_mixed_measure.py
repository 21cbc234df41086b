"""Pairs with several drafts, measured: what a draft has to read before a token, and the cache of profiles."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from specgym.decoding import (
    ArgumentError,
    Drafter,
    DraftStep,
    EarlyExit,
    LanguageModel,
    MixedProfile,
    ModelDrafter,
    NGramDrafter,
    OneHotStep,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SuffixDrafter,
    describe_hardware,
    drafts_of,
    measure,
    measure_mixed,
    measured_mixed,
)
from specgym.decoding.drafts.mixed import draft_models
from specgym.decoding.latency import mixed_measure
from specgym.decoding.latency.batch_grid import StopwatchDrafter
from specgym.decoding.latency.mixed_measure import READINGS
from specgym.decoding.models.captured import USES


@pytest.fixture
def target(make_model: Callable[..., PreTrainedModel]) -> LanguageModel:
    return LanguageModel(make_model("llama", layers=1, vocabulary=64, hidden=16, context=160))


@pytest.fixture
def pair(target: LanguageModel, make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    model = ModelDrafter(LanguageModel(make_noisy(target.model, 0.3), prepack=False))
    empty = NGramDrafter.fit([[1, 2, 3]], 64)
    return Pair(target, [model, empty, PromptLookupDrafter(64), SuffixDrafter(64)], name="toy")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_draft_is_measured_with_every_number_of_unread_tokens(pair: Pair, temperature: float) -> None:
    result = measure_mixed(pair, max_draft_length=6, repeats=3, sampling=Sampling(temperature), tries=1)
    assert [draft.free for draft in result.drafts] == [False, True, True, True]
    for draft in result.drafts:
        assert tuple(draft.reading_seconds) == READINGS
        seconds = list(draft.reading_seconds.values())
        assert seconds == sorted(seconds)
    assert list(result.target_seconds) == [1, 2, 3, 5, 7]
    assert (result.pair, result.sampling) == ("toy", "sampled" if temperature else "greedy")
    assert result.hardware == describe_hardware(pair)
    assert result.target(1) >= result.autoregressive_seconds


@pytest.mark.parametrize("several", [True, False])
def test_timed_passes_are_captured_as_those_of_long_texts_are(pair: Pair, several: bool) -> None:
    if several:
        measure_mixed(pair, max_draft_length=4, repeats=1, tries=1)
    else:
        measure(Pair(pair.target, drafts_of(pair.draft)[0]), max_draft_length=4, repeats=1, tries=1)
    for model, sizes in ((pair.target, {1, 2, 3, 5}), (draft_models(pair.draft)[0], {1})):
        assert model.captured is not None
        assert {count for _, count, *_ in model.captured.graphs} >= sizes
        assert model.captured.patience == USES


class _ByTheToken:
    """A draft that takes a second of a clock for every token that it has to read, and half a second besides."""

    name, vocabulary_size = "by-the-token", 64

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def start(self, prompt: Sequence[int], *rest: Any) -> _ByTheToken:
        self.length = len(prompt) - 1
        return self

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        self.length = min(self.length, len(context) - 1)
        for number in range(count):
            self.clock[0] += 0.5 + len(context) + number - self.length
            self.length = len(context) + number
            yield OneHotStep(1)

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


def test_a_draft_is_timed_by_the_tokens_that_it_has_not_read(
    target: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1e-6
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", tick)
    pair = Pair(target, [PromptLookupDrafter(64), _ByTheToken(clock)])
    result = measure_mixed(pair, max_draft_length=2, repeats=3, tries=1)
    for size in READINGS:
        assert result.reading(1, size) == pytest.approx(size + 0.5, rel=1e-3)
        assert result.reading(0, size) < 0.01


def test_a_draft_that_proposes_nothing_is_refused_unless_it_is_free(
    pair: Pair, make_model: Callable[..., PreTrainedModel]
) -> None:
    short = ModelDrafter(LanguageModel(make_model("llama", layers=1, vocabulary=64, hidden=16, context=8)))
    with pytest.raises(ArgumentError, match=r"draft .* proposes nothing after the prompt of 40 tokens"):
        measure_mixed(Pair(pair.target, [PromptLookupDrafter(64), short]), repeats=1)
    with pytest.raises(ArgumentError, match=r"a mixed latency profile needs a draft, and pair .* has none"):
        measured_mixed(pair.without_draft())


@pytest.mark.parametrize("doubts", [(), ("a doubt",)])
def test_a_pair_is_measured_once_until_asked_again_unless_it_was_in_doubt(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    doubts: tuple[str, ...],
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path))
    whole = measure_mixed(pair, max_draft_length=1, repeats=1, tries=1)
    measured: list[Sampling] = []

    def quick(pair: Pair, *, sampling: Sampling) -> MixedProfile:
        measured.append(sampling)
        return replace(whole, autoregressive_seconds=1.0 / len(measured), spread=0.0, doubts=doubts)

    monkeypatch.setattr(mixed_measure, "measure_mixed", quick)
    monkeypatch.setattr(mixed_measure, "_known", {})
    first = measured_mixed(pair)
    assert measured_mixed(pair) is first
    mixed_measure._known.clear()  # as in another process
    assert (measured_mixed(pair) == first) == (not doubts)
    assert len(measured) == 1 + bool(doubts)
    before = len(measured)
    measured_mixed(pair, refresh=True)
    measured_mixed(pair, sampling=Sampling(1.0))
    assert len(measured) == before + 2
    if not doubts:
        for path in (tmp_path / "latency").iterdir():
            path.write_text("{}")
        mixed_measure._known.clear()
        with caplog.at_level(logging.WARNING):
            measured_mixed(pair)
        assert "not a mixed latency profile of this version" in caplog.text
        assert len(measured) == before + 3


def test_verification_is_timed_after_a_draft_that_is_no_early_exit(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes on from what an exit computed is cheaper than one of other drafts."""
    model = make_model("llama", vocabulary=64, hidden=16, context=160)
    timed: list[str] = []

    class Noted(StopwatchDrafter):
        def __init__(self, inner: Drafter) -> None:
            timed.append(inner.name)
            super().__init__(inner)

    monkeypatch.setattr(mixed_measure, "StopwatchDrafter", Noted)
    small = make_model("llama", layers=1, vocabulary=64, hidden=16)
    measure_mixed(Pair(model, [EarlyExit(1), small]), max_draft_length=2, repeats=1, tries=1)
    assert timed == ["LlamaForCausalLM"]
