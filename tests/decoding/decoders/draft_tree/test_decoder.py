"""Refusals of `DraftTreeDecoder`, its knobs, and its rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding import DraftTreeDecoder, KnobError, NumericalError, Pair, PromptLookupDrafter, Sampling
from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment, DraftTreeModelError
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeRound
from specgym.decoding.decoders.draft_tree.files import save_acceptance, save_alignment
from specgym.decoding.decoders.draft_tree.predictor import AcceptancePredictor, PredictorShape

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def pair(make_model: MakeModel, make_noisy: MakeModel) -> Pair:
    model = make_model("llama", vocabulary=48)
    return Pair(model, make_noisy(model, 0.2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "likely"}, "no rule 'likely'; there are: likeliest, independent, distinct"),
        ({"pruning": "hard"}, "no pruning 'hard'; there are: absolute, level, ratio, throughput"),
        ({"draft_sampling": Sampling(0.0)}, "needs second choices"),
        ({"max_candidates": 0}, "max_candidates must be a whole number of at least 1"),
        ({"max_nodes": 1.5}, "max_nodes must be a whole number of at least 1"),
        ({"alignment_weight": 1.5}, "alignment_weight is a share, 0 to 1"),
        ({"alignment_weight": 0.5}, "alignment_weight needs aligned states: give an alignment"),
    ],
)
def test_what_cannot_work_is_refused_by_name(pair: Pair, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTreeDecoder(pair, **arguments)


def test_guidance_of_other_widths_is_refused_by_name(pair: Pair) -> None:
    fitting = AffineAlignment(32, 32)
    for alignment, width in ((AffineAlignment(16, 32), 32), (AffineAlignment(32, 16), 32), (fitting, 16)):
        with pytest.raises(DraftTreeModelError, match="has states of width 32, but the alignment or predictor is for"):
            DraftTreeDecoder(pair, alignment=alignment, predictor=AcceptancePredictor(PredictorShape(width)))
    with pytest.raises(ValueError, match="a predictor needs aligned states: give an alignment"):
        DraftTreeDecoder(pair, predictor=AcceptancePredictor(PredictorShape(32)))


def test_what_ships_or_lies_beside_the_draft_is_found(pair: Pair, tmp_path: Path) -> None:
    assert DraftTreeDecoder.for_pair(pair).guidance.alignment is None
    draft = DraftTreeDecoder(pair).draft
    draft.name = str(tmp_path / "mine")
    alignment, predictor = AffineAlignment(32, 32), AcceptancePredictor(PredictorShape(32))
    save_alignment(alignment, tmp_path / "mine-alignment", draft, pair.target)
    result = DraftTreeDecoder.for_pair(pair).guidance
    assert result.alignment is not None
    assert result.predictor is None
    assert not result.needs_states
    save_acceptance(predictor, tmp_path / "mine-acceptance", draft, pair.target, alignment)
    assert DraftTreeDecoder.for_pair(pair).guidance.predictor is not None


def test_a_draft_that_is_no_model_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama", vocabulary=48)
    with pytest.raises(ValueError, match="needs a model as draft"):
        DraftTreeDecoder(Pair(model, PromptLookupDrafter(48)))
    with pytest.raises(ValueError, match="needs a draft"):
        DraftTreeDecoder(Pair(model))


def test_there_is_a_threshold_only_where_there_is_pruning(pair: Pair) -> None:
    assert [knob.name for knob in DraftTreeDecoder(pair).knobs] == [
        knob.name for knob in DraftTreeDecoder.knobs_without_pair()
    ]
    without = DraftTreeDecoder(pair, pruning=None)
    assert [knob.name for knob in without.knobs] == ["max_candidates", "max_depth", "node_budget"]
    with pytest.raises(KnobError, match="no knob 'min_acceptance_prob'"):
        without.generate([1, 2], max_new_tokens=4, knobs={"min_acceptance_prob": 0.1})
    assert {knob.name: knob.default for knob in DraftTreeDecoder.knobs_without_pair()} == {
        "max_candidates": 5,
        "max_depth": 4,
        "node_budget": 16,
        "min_acceptance_prob": 0.1,
    }


@pytest.mark.parametrize("name", ["max_candidates", "max_depth", "node_budget"])
@pytest.mark.parametrize("rule", ["likeliest", "distinct"])
def test_with_a_knob_at_its_least_decoding_goes_on(pair: Pair, name: str, rule: str) -> None:
    decoder = DraftTreeDecoder(pair, rule)
    least = {knob.name: knob.low for knob in decoder.knobs}[name]
    generation = decoder.generate([1, 2, 3], max_new_tokens=20, knobs={name: least})
    assert len(generation.tokens) == 20
    if least == 0:
        assert len(generation.rounds) == 20
        assert not any(round_.drafted or round_.draft_steps for round_ in generation.rounds)
    else:
        assert max(round_.drafted for round_ in generation.rounds) <= 4  # a chain


def test_seconds_of_parts_are_within_those_of_the_round(pair: Pair) -> None:
    for round_ in DraftTreeDecoder(pair).generate([1, 2, 3], max_new_tokens=20).rounds:
        assert isinstance(round_, DraftTreeRound)
        drafting = round_.alignment_seconds + round_.prediction_seconds + round_.pruning_seconds
        assert 0 <= drafting < round_.draft_seconds
        parts = round_.forward_seconds + round_.judge_seconds + round_.cache_seconds
        assert 0 < parts <= round_.verify_seconds * (1 + 1e-9)


def test_a_seed_gives_the_same_text_and_the_same_rounds_twice(pair: Pair) -> None:
    for rule in ("likeliest", "independent", "distinct"):
        decoder = DraftTreeDecoder(pair, rule, pruning="ratio")
        once, twice, other = (
            decoder.generate([1, 2, 3], max_new_tokens=40, sampling=Sampling(0.9), seed=seed) for seed in (1, 1, 2)
        )
        assert once.tokens == twice.tokens != other.tokens
        counts = [[(round_.drafted, round_.accepted) for round_ in item.rounds] for item in (once, twice)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_target_that_gives_nan_is_refused_and_a_draft_that_does_costs_only_speed(
    make_model: MakeModel, temperature: float
) -> None:
    model, draft = make_model("llama", vocabulary=48), make_model("llama", vocabulary=48, seed=3)
    pair = Pair(model, draft)
    decoders = [DraftTreeDecoder(pair, rule) for rule in ("likeliest", "independent", "distinct")]
    expected = decoders[0].generate([1, 2, 3], max_new_tokens=10)
    with torch.no_grad():
        draft.get_input_embeddings().get_parameter("weight").fill_(float("nan"))
    for decoder in decoders:
        generation = decoder.generate([1, 2, 3], max_new_tokens=10, sampling=Sampling(temperature), seed=0)
        assert len(generation.tokens) == 10
        assert not any(round_.accepted for round_ in generation.rounds)
        if not temperature:
            assert generation.tokens == expected.tokens
    with torch.no_grad():
        model.get_input_embeddings().get_parameter("weight").fill_(float("nan"))
    for decoder in decoders:
        with pytest.raises(NumericalError, match="NaN or infinite logits"):
            decoder.generate([1, 2, 3], max_new_tokens=10, sampling=Sampling(temperature), seed=0)


def test_what_pruning_lost_is_counted(make_model: MakeModel) -> None:
    model = make_model("llama", vocabulary=48)
    pair = Pair(model, model)  # the draft is always right
    whole = DraftTreeDecoder(pair).generate([1, 2, 3], max_new_tokens=40, knobs={"min_acceptance_prob": 0.0})
    assert not any(round_.lost for round_ in whole.rounds)  # type: ignore[attr-defined]
    cut = DraftTreeDecoder(pair).generate([1, 2, 3], max_new_tokens=40, knobs={"min_acceptance_prob": 1.0})
    assert cut.tokens == whole.tokens
    lost = [round_.lost for round_ in cut.rounds]  # type: ignore[attr-defined]
    assert sum(lost) > 10
    assert all(0 <= item <= 1 for item in lost)
    assert len(cut.rounds) > len(whole.rounds)
