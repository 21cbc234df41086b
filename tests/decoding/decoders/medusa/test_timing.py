"""Timing Medusa rounds: which heads and which trees, for which heads a profile is kept, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa import decoder as decoder_module
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder, TypicalMedusaDecoder
from specgym.decoding.decoders.medusa.files import save_heads
from specgym.decoding.decoders.medusa.heads import MedusaHeads, MedusaHeadsError
from specgym.decoding.latency import measure as latency_measure
from specgym.decoding.latency.accelerators import HARDWARE
from specgym.decoding.latency.interleaved import describe_hardware
from specgym.decoding.latency.measure import measure, measured
from specgym.decoding.latency.probe import Uncertainty
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.latency.roofline import MODEL_SHAPES, roofline
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from tests.helpers.small_medusa_heads import random_heads

SHAPE = {"blocks": 1, "own_output": False, "outputs": 64, "dtype": "float32"}


@pytest.fixture(scope="module")
def alone(make_model: Callable[..., PreTrainedModel]) -> Pair:
    """A target whose passes are captured once for all tests."""
    return target_alone(make_model)


def target_alone(make_model: Callable[..., PreTrainedModel]) -> Pair:
    return Pair(make_model("llama", layers=1, vocabulary=64, hidden=16, context=256), name="alone")


@pytest.fixture
def heads(alone: Pair) -> MedusaHeads:
    return heads_of(alone, 3)


def heads_of(pair: Pair, count: int, **more: Any) -> MedusaHeads:
    return random_heads(pair.target.model, count, **more)


def medusa(pair: Pair, heads: MedusaHeads | None, **arguments: Any) -> LatencyProfile:
    usual: dict[str, Any] = {"repeats": 3, "max_target_tokens": 12, "prompt": [1, 2, 3, 4, 5]}
    decoder = arguments.pop("decoder", MedusaDecoder)
    return measure(pair, decoder(pair, heads), **(usual | arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("largest", "sizes", "asked"),
    [(1, [1], [0]), (3, [1, 2, 3], [0, 1, 2]), (11, [1, 2, 3, 4, 5, 6, 8, 10, 11], [0, 1, 2, 3])],
)
def test_every_number_of_heads_and_every_size_of_tree_are_timed_up_to_the_largest(
    alone: Pair, heads: MedusaHeads, largest: int, sizes: list[int], asked: list[int], temperature: float
) -> None:
    result = medusa(alone, heads, max_target_tokens=largest, sampling=Sampling(temperature=temperature))
    assert list(result.target_seconds) == sizes
    assert list(result.draft_seconds) == asked
    assert all(seconds > 0 for seconds in result.draft_seconds.values())
    assert (result.kind, result.batch_size, result.context) == ("medusa", 1, 5)
    assert result.sampling == ("sampled" if temperature else "greedy")
    assert result.hardware == {**describe_hardware(alone), "medusa": {"heads": 3, **SHAPE}}


def test_by_default_all_that_the_knobs_allow_is_covered(make_model: Callable[..., PreTrainedModel]) -> None:
    """With learned positions, which the other tests do not have."""
    pair = Pair(make_model("opt", layers=1, vocabulary=64, hidden=16, context=256))
    heads = heads_of(pair, 5)
    result = measure(pair, MedusaDecoder(pair, heads), repeats=1)
    knobs = {knob.name: knob.high for knob in MedusaDecoder(pair, heads).knobs}
    assert (
        (max(result.draft_seconds), max(result.target_seconds)) == (knobs["heads"], knobs["tree_size"] + 1) == (5, 65)
    )


def test_the_rounds_that_are_timed_ask_and_read_what_the_profile_says(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, read, asked = target_alone(make_model), list[int](), list[int]()
    heads = heads_of(alone, 3)
    forward, candidates = alone.target.model.forward, heads.candidates

    def watched(*arguments: Any, **more: Any) -> Any:
        read.append(more["input_ids"].shape[1])
        return forward(*arguments, **more)

    def counted(hidden: Any, count: int, ranks: int) -> Any:
        asked.append(count)
        return candidates(hidden, count, ranks)

    monkeypatch.setattr(alone.target.model, "forward", watched)
    monkeypatch.setattr(heads, "candidates", counted)
    result = medusa(alone, heads, max_target_tokens=40)
    assert set(result.target_seconds) <= set(read)
    assert max(read) == 40
    assert set(asked) | {0} == set(result.draft_seconds)


def test_trees_and_heads_are_timed_alike_whatever_the_heads_have_learned(alone: Pair, heads: MedusaHeads) -> None:
    heads.accuracies = ((0.9, 0.1), (0.1, 0.0), (0.01, 0.0))  # trees of these would hardly ever ask the last head
    result = medusa(alone, heads, max_target_tokens=20)
    assert list(result.draft_seconds) == [0, 1, 2, 3]
    assert max(result.target_seconds) == 20


def test_the_profile_charges_real_rounds_by_heads_asked_and_tokens_read(alone: Pair, heads: MedusaHeads) -> None:
    result = LatencyProfile("t", {0: 0.25, 1: 1.0, 3: 2.0}, {1: 10.0, 4: 13.0}, 9.0, {}, kind="medusa")
    done = MedusaDecoder(alone, heads).generate([1, 2, 3], max_new_tokens=9, knobs={"heads": 3, "tree_size": 8})
    charged = sum(result.draft(round_.draft_steps) + 9 + round_.target_tokens for round_ in done.rounds)
    assert result.charge(done.rounds) == pytest.approx(charged)
    assert {round_.target_tokens for round_ in done.rounds[:2]} == {9}


def test_a_round_has_no_more_heads_than_there_are_and_candidates_alone_have_a_marginal_cost() -> None:
    result = LatencyProfile("t", {0: 0.0, 5: 5.0}, {1: 10.0, 65: 42.0}, 10.0, {}, kind="medusa")
    assert result.round(2) == pytest.approx(2.0 + 11.0)
    assert result.round(64) == pytest.approx(5.0 + 42.0)
    assert result.marginal_cost() == pytest.approx(0.05)


@pytest.mark.parametrize(("temperature", "named", "judges"), [(0.0, "medusa", False), (1.0, "medusa-typical", True)])
def test_typical_acceptance_is_timed_as_such_when_sampling_and_greedy_as_the_exact_one_that_it_is(
    alone: Pair, heads: MedusaHeads, monkeypatch: pytest.MonkeyPatch, temperature: float, named: str, judges: bool
) -> None:
    judged: list[int] = []

    def counted(*arguments: Any) -> Any:
        judged.append(1)
        return typical(*arguments)

    typical = decoder_module.typical
    monkeypatch.setattr(decoder_module, "typical", counted)
    sampling = Sampling(temperature)
    medusa(alone, heads, sampling=sampling)
    assert not judged
    result = medusa(alone, heads, sampling=sampling, decoder=TypicalMedusaDecoder)
    assert result.kind == named
    assert bool(judged) is judges
    assert (max(result.draft_seconds), max(result.target_seconds)) == (3, 12)
    TypicalMedusaDecoder(alone, heads).generate([1, 2, 3], max_new_tokens=9, sampling=sampling, seed=0)
    assert bool(judged) is judges  # as the decoder does itself


def test_profiles_of_typical_acceptance_are_kept_apart_where_they_differ(
    alone: Pair, heads: MedusaHeads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    timed = []

    def quick(pair: Pair, decoder: MedusaDecoder, *, sampling: Sampling) -> LatencyProfile:
        timed.append(decoder.cost_kind(sampling.greedy))
        return LatencyProfile(pair.name, {0: 0.0}, {1: 1.0}, 1.0, {}, kind=timed[-1])

    monkeypatch.setattr(latency_measure, "measure", quick)
    for sampling in (Sampling(0.0), Sampling(1.0)):
        for decoder in (MedusaDecoder, TypicalMedusaDecoder):
            measured(alone, decoder(alone, heads), sampling=sampling)
    assert timed == ["medusa", "medusa", "medusa-typical"]


def test_other_contexts_are_timed_behind_texts_of_their_length(alone: Pair, heads: MedusaHeads) -> None:
    result = medusa(alone, heads, contexts=(40, 5, 80))
    assert [(point.batch_size, point.context) for point in (result, *result.points)] == [(1, 5), (1, 40), (1, 80)]
    between = result.at(context=60)
    assert (between.kind, list(between.draft_seconds)) == ("medusa", [0, 1, 2, 3])


def test_heads_whose_candidates_are_few_are_timed_as_far_as_they_go_and_it_is_said(
    alone: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    single = heads_of(alone, 1, vocabulary=range(6))
    with caplog.at_level(logging.WARNING):
        result = measure(alone, MedusaDecoder(alone, single), repeats=1, prompt=[1, 2])
    assert max(result.target_seconds) == 6  # of the sizes that are timed; seven tokens would fit
    assert "cannot read 65 tokens; rounds are timed up to 6" in caplog.text
    with pytest.raises(ValueError, match="cannot read 30 tokens; give a max_target_tokens of at most 6"):
        medusa(alone, single, max_target_tokens=30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_target_tokens": 0}, "max_target_tokens must be a whole number of at least 1, got 0"),
        ({"max_draft_length": 4}, "max_draft_length is not for medusa rounds.*max_target_tokens"),
        ({"batch_sizes": (1, 4)}, "medusa rounds are timed at batch size 1 alone.*leave them out"),
        ({"contexts": (240,)}, "a context of 240 tokens leaves .* no room for medusa rounds.* takes 20 tokens"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is(
    alone: Pair, heads: MedusaHeads, arguments: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"repeats": 10**9, "prompt": [1, 2, 3]}
    with pytest.raises(ValueError, match=message):
        measure(alone, MedusaDecoder(alone, heads), **(usual | arguments))


def test_a_target_without_heads_is_told_how_to_train_some(
    alone: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone.target, "name", str(tmp_path / "target"))
    for function in (measure, measured):
        with pytest.raises(MedusaHeadsError, match=r"no Medusa heads ship for .*target.*decoding\.fit medusa --target"):
            function(alone, "medusa")


def test_profiles_are_kept_by_the_shape_of_the_heads_and_shared_among_pairs_of_one_target(
    alone: Pair,
    heads: MedusaHeads,
    make_noisy: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(alone.target, "name", str(tmp_path / "target"))
    timed: list[int] = []

    def quick(pair: Pair, decoder: MedusaDecoder, **more: Any) -> LatencyProfile:
        assert pair.draft is None
        timed.append(decoder.heads.shape.heads)
        sure = Uncertainty({}, {}, 0.0, 0.0)
        return LatencyProfile(pair.name, {0: 0.0}, {1: 1.0}, 0.1 * len(timed), {}, kind="medusa", uncertainty=sure)

    monkeypatch.setattr(latency_measure, "measure", quick)
    save_heads(heads, tmp_path / "target-medusa", alone.target)
    usual = measured(alone, "medusa")
    drafted = Pair(alone.target, make_noisy(alone.target.model, 0.3), name="drafted")
    learned = heads_of(alone, 3, seed=1)
    for again in (measured(drafted, "medusa"), measured(alone, MedusaDecoder(alone, learned))):
        assert again == usual
    others = [
        heads_of(alone, 2),
        heads_of(alone, 3, own_output=True),
        heads_of(alone, 3, blocks=2),
        heads_of(alone, 3, vocabulary=range(9)),
    ]
    for other in others:
        assert measured(alone, MedusaDecoder(alone, other)) != usual
    latency_measure._known.clear()  # as in another process
    assert measured(alone, "medusa") == usual
    assert timed == [3, 2, 3, 3, 3]


def test_charging_medusa_by_another_kind_is_refused_and_no_roofline_is_promised() -> None:
    chains = LatencyProfile("toy", {0: 0.0}, {1: 1.0}, 1.0, {})
    with pytest.raises(LatencyProfileError, match=r"measured\(pair, decoder\), or .* --decoder medusa$"):
        chains.require_kind("medusa")
    with pytest.raises(ValueError, match=r"cannot be computed.*measured\(pair, 'medusa'\)"):
        roofline(MODEL_SHAPES["opt-125m"], None, next(iter(HARDWARE)), decoder="medusa")
