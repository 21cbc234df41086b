"""Timing rounds with draft trees: which trees, what stands beside the draft, and what is refused. No test looks at a
time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding import PromptLookupDrafter
from specgym.decoding.decoders.draft_tree import pruning as rules
from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder, DraftTreeSession
from specgym.decoding.decoders.draft_tree.predictor import AcceptancePredictor, NodeFeatures, PredictorShape
from specgym.decoding.latency import measure as latency_measure
from specgym.decoding.latency.accelerators import HARDWARE
from specgym.decoding.latency.interleaved import describe_hardware
from specgym.decoding.latency.measure import measure, measured
from specgym.decoding.latency.probe import Uncertainty
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.latency.roofline import MODEL_SHAPES, roofline
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling

HIDDEN, DRAFT_HIDDEN = 16, 32
UNGUIDED = {
    "rule": "likeliest",
    "draft_sampling": "sampled",
    "alignment": False,
    "alignment_weight": 0.0,
    "predictor_width": 0,
    "aligned_scores": False,
}
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def pair(make_model: MakeModel) -> Pair:
    """A pair whose passes are captured once for all tests."""
    return pair_of(make_model)


def pair_of(make_model: MakeModel, draft_context: int = 256) -> Pair:
    draft = make_model("llama", layers=1, vocabulary=64, hidden=DRAFT_HIDDEN, context=draft_context, seed=1)
    return Pair(make_model("llama", layers=1, vocabulary=64, hidden=HIDDEN, context=256), draft, name="toy")


def guided(pair: Pair, weight: float = 0.5, width: int = 8, **more: Any) -> DraftTreeDecoder:
    """With an alignment, and a predictor of some width; 0 for none."""
    predictor = AcceptancePredictor(PredictorShape(HIDDEN, width=width)) if width else None
    alignment = AffineAlignment(DRAFT_HIDDEN, HIDDEN)
    return DraftTreeDecoder(pair, alignment=alignment, alignment_weight=weight, predictor=predictor, **more)


def trees(pair: Pair, **arguments: Any) -> LatencyProfile:
    usual: dict[str, Any] = {"repeats": 1, "max_target_tokens": 12, "prompt": [1, 2, 3, 4, 5]}
    return measure(pair, arguments.pop("decoder", "draft-tree"), **(usual | arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("largest", "sizes", "levels"),
    [(1, [1], [0]), (3, [1, 2, 3], [0, 1]), (6, [1, 2, 3, 5, 6], [0, 1, 2]), (12, [1, 2, 3, 5, 9, 12], [0, 1, 2, 3])],
)
def test_every_number_of_levels_and_every_size_of_tree_are_timed_up_to_the_largest(
    pair: Pair, largest: int, sizes: list[int], levels: list[int], temperature: float
) -> None:
    result = trees(pair, max_target_tokens=largest, sampling=Sampling(temperature))
    assert list(result.target_seconds) == sizes
    assert list(result.draft_seconds) == levels
    assert (result.pair, result.kind, result.batch_size, result.context) == ("toy", "draft-tree", 1, 5)
    assert result.sampling == ("sampled" if temperature else "greedy")
    assert result.hardware == {**describe_hardware(pair), "draft_tree": UNGUIDED}


def test_by_default_all_that_the_knobs_allow_is_covered(pair: Pair) -> None:
    result = measure(pair, "draft-tree", repeats=1)
    knobs = {knob.name: knob.high for knob in DraftTreeDecoder.knobs_without_pair()}
    assert list(result.draft_seconds) == list(range(int(knobs["max_depth"]) + 1))
    assert max(result.target_seconds) == knobs["node_budget"] + 1 == DraftTreeDecoder.largest_pass


@pytest.mark.parametrize("rule", ["likeliest", "independent", "distinct"])
def test_passes_are_of_all_sizes_and_drafting_is_timed_with_levels_of_usual_width(
    make_model: MakeModel, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is drawn at random, too, where chance would decide about the size of a tree."""
    pair = pair_of(make_model)
    read: dict[str, list[int]] = {"target": [], "draft": []}
    assert pair.draft is not None
    decoder = DraftTreeDecoder(pair, rule)
    for name, model in (("target", pair.target.model), ("draft", decoder.draft.model)):

        def watched(*arguments: Any, name: str = name, forward: Any = model.forward, **more: Any) -> Any:
            read[name].append(more["input_ids"].shape[1])
            return forward(*arguments, **more)

        monkeypatch.setattr(model, "forward", watched)
    rounds: list[tuple[int, int, int]] = []
    of_round = DraftTreeSession._round

    def counted(session: Any, knobs: Any) -> Any:
        result = of_round(session, knobs)
        rounds.append((result.draft_steps, result.drafted, int(knobs["node_budget"])))
        return replace(result, draft_seconds=result.drafted, verify_seconds=100 * result.target_tokens)

    monkeypatch.setattr(DraftTreeSession, "_round", counted)
    result = trees(pair, max_target_tokens=65, decoder=decoder, sampling=Sampling(1.0))
    assert result.draft_seconds == {levels: 4 * levels for levels in range(9)}  # not of the wider trees
    assert result.target_seconds == {size: 100 * size for size in result.target_seconds}
    assert set(result.target_seconds) <= set(read["target"])
    assert max(read["target"]) == 65
    assert all(drafted == expected for _, drafted, expected in rounds)  # at the first try
    assert {(steps, drafted) for steps, drafted, _ in rounds if drafted <= 32 and drafted % 4 == 0} == {
        (levels, 4 * levels) for levels in range(9)
    }
    assert max(read["draft"]) == 8  # of the widest tree; of what a text has grown by never more


def test_what_stands_beside_the_draft_takes_its_time_and_decides_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def hopeless(predictor: AcceptancePredictor, features: NodeFeatures) -> Tensor:
        asked.append(len(features.depth))
        return torch.zeros(len(features.depth))

    monkeypatch.setattr(AcceptancePredictor, "predict", hopeless)
    result = trees(pair, decoder=guided(pair))
    assert max(asked) > 4
    assert (max(result.draft_seconds), max(result.target_seconds)) == (3, 12)
    messages = {"alignment": True, "alignment_weight": 0.5, "predictor_width": 8, "aligned_scores": True}
    assert result.hardware["draft_tree"] == UNGUIDED | messages


@pytest.mark.parametrize("rule", ["independent", "distinct"])
def test_children_that_are_drawn_are_drawn_and_verified_by_their_rule(
    pair: Pair, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    kind = type(rules.RULES[rule])
    for name in ("children", "verify"):
        method = getattr(kind, name)

        def counted(*arguments: Any, name: str = name, method: Any = method) -> Any:
            calls.append(name)
            return method(*arguments)

        monkeypatch.setattr(kind, name, counted)
    trees(pair, decoder=DraftTreeDecoder(pair, rule), sampling=Sampling(1.0))
    assert set(calls) == {"children", "verify"}


def test_the_profile_charges_real_rounds_by_the_drafts_passes_and_the_tokens_read(pair: Pair) -> None:
    result = LatencyProfile("t", {0: 0.25, 1: 1.0, 4: 7.0}, {1: 10.0, 4: 13.0}, 9.0, {}, kind="draft-tree")
    done = DraftTreeDecoder(pair).generate([1, 2, 3], max_new_tokens=12, knobs={"max_depth": 3})
    charged = sum(result.draft(round_.draft_steps) + 9 + round_.target_tokens for round_ in done.rounds)
    assert result.charge(done.rounds) == pytest.approx(charged)
    assert max(round_.draft_steps for round_ in done.rounds) == 3 < max(round_.drafted for round_ in done.rounds)


def test_a_round_has_no_more_levels_than_were_timed_and_candidates_alone_have_a_marginal_cost() -> None:
    result = LatencyProfile("t", {0: 0.0, 8: 4.0}, {1: 10.0, 65: 42.0}, 10.0, {}, kind="draft-tree")
    assert result.round(2) == pytest.approx(1.0 + 11.0)
    assert result.round(64) == pytest.approx(4.0 + 42.0)
    assert result.marginal_cost() == pytest.approx(0.05)


def test_other_contexts_are_timed_behind_texts_of_their_length(pair: Pair) -> None:
    result = trees(pair, contexts=(40, 5, 80))
    assert [(point.batch_size, point.context) for point in (result, *result.points)] == [(1, 5), (1, 40), (1, 80)]
    between = result.at(context=60)
    assert (between.kind, list(between.draft_seconds)) == ("draft-tree", [0, 1, 2, 3])


def test_a_draft_with_a_short_context_leaves_as_little_room_as_a_target_with_one(make_model: MakeModel) -> None:
    short = pair_of(make_model, draft_context=64)
    assert max(trees(short, prompt=[1] * 44).draft_seconds) == 3
    with pytest.raises(ValueError, match="whose context is 64, no room for draft-tree rounds to be timed, which takes"):
        trees(short, prompt=[1] * 45)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_target_tokens": 0}, "max_target_tokens must be a whole number of at least 1, got 0"),
        ({"max_target_tokens": 514}, "has a vocabulary of 64 tokens, too few .* max_target_tokens of at most 513"),
        ({"max_draft_length": 4}, "max_draft_length is not for draft-tree rounds.*max_target_tokens"),
        ({"batch_sizes": (1, 4)}, "draft-tree rounds are timed at batch size 1 alone.*leave them out"),
        ({"contexts": (240,)}, "a context of 240 tokens leaves .* no room for draft-tree rounds.* takes 25 tokens"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is(
    pair: Pair, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(pair, "draft-tree", **dict[str, Any]({"repeats": 10**9, "prompt": [1, 2, 3]} | arguments))


def test_a_draft_that_is_a_model_is_needed(pair: Pair) -> None:
    for function in (measure, measured):
        with pytest.raises(ValueError, match="DraftTreeDecoder needs a draft"):
            function(Pair(pair.target), "draft-tree")
        with pytest.raises(ValueError, match="DraftTreeDecoder needs a model as draft"):
            function(Pair(pair.target, PromptLookupDrafter(64)), "draft-tree")


def test_profiles_are_kept_by_the_pair_and_by_what_stands_beside_its_draft(
    pair: Pair, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))
    timed: list[str] = []

    def quick(pair: Pair, decoder: DraftTreeDecoder, **more: Any) -> LatencyProfile:
        assert pair.draft is not None
        assert decoder.pair.draft is pair.draft
        timed.append(pair.name)
        sure = Uncertainty({}, {}, 0.0, 0.0)
        return LatencyProfile(pair.name, {0: 0.0}, {1: 1.0}, 0.1 * len(timed), {}, kind="draft-tree", uncertainty=sure)

    monkeypatch.setattr(latency_measure, "measure", quick)
    usual = measured(pair, "draft-tree")
    assert measured(pair, decoder=DraftTreeDecoder(pair)) == usual
    learned = guided(pair)
    with torch.no_grad():
        assert learned.guidance.alignment is not None
        learned.guidance.alignment.bias.add_(1)  # as fast as before
    others = [
        learned,
        guided(pair, weight=0.25),
        guided(pair, width=16),
        guided(pair, width=0),
        DraftTreeDecoder(pair, "distinct"),
        DraftTreeDecoder(pair, draft_sampling=Sampling(0.8, top_k=9)),
    ]
    result = [measured(pair, decoder=other) for other in others]
    assert len({item.autoregressive_seconds for item in (usual, *result)}) == 7
    assert measured(pair, decoder=guided(pair)) == result[0]
    assert measured(Pair(pair.target, make_model("llama", vocabulary=64)), "draft-tree") != usual
    latency_measure._known.clear()  # as in another process
    assert measured(pair, "draft-tree") == usual
    assert len(timed) == 8


def test_charging_trees_by_another_kind_is_refused_and_no_roofline_is_promised() -> None:
    chains = LatencyProfile("toy", {0: 0.0}, {1: 1.0}, 1.0, {})
    with pytest.raises(LatencyProfileError, match=r"measured\(pair, decoder\), or .* --decoder draft-tree$"):
        chains.require_kind("draft-tree")
    with pytest.raises(ValueError, match=r"cannot be computed.*measured\(pair, 'draft-tree'\)"):
        roofline(MODEL_SHAPES["opt-125m"], MODEL_SHAPES["opt-125m"], next(iter(HARDWARE)), decoder="draft-tree")
