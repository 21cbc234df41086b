"""The network that foretells acceptance: where it begins, what it learns, and that its temperature calibrates it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specgym.decoding.decoders.draft_tree.alignment import DraftTreeModelError
from specgym.decoding.decoders.draft_tree.predictor import (
    AcceptancePredictor,
    NodeFeatures,
    PredictorShape,
    calibrating_temperature,
    log_odds,
)

WIDTH = 6


def features(count: int, seed: int = 0, deepest: int = 4) -> NodeFeatures:
    generator = torch.Generator().manual_seed(seed)
    return NodeFeatures(
        hidden=torch.randn(count, WIDTH, generator=generator),
        log_probability=torch.rand(count, generator=generator).clamp(min=1e-3).log(),
        entropy=3 * torch.rand(count, generator=generator),
        depth=torch.randint(1, deepest + 1, (count,), generator=generator),
        aligned_log_probability=torch.rand(count, generator=generator).clamp(min=1e-3).log(),
    )


def trained(examples: NodeFeatures, labels: Tensor, **more: Any) -> AcceptancePredictor:
    torch.manual_seed(0)
    predictor = AcceptancePredictor(PredictorShape(WIDTH, width=32, **more))
    optimiser = torch.optim.AdamW(predictor.parameters(), lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        functional.binary_cross_entropy_with_logits(predictor(examples), labels).backward()
        optimiser.step()
    return predictor.eval()


def brier(predictions: Tensor, labels: Tensor) -> float:
    return float((predictions - labels).detach().square().mean())


@pytest.mark.parametrize("aligned_scores", [True, False])
def test_before_training_it_is_the_drafts_own_probability(aligned_scores: bool) -> None:
    predictor, options = AcceptancePredictor(PredictorShape(WIDTH, aligned_scores=aligned_scores)), features(20)
    torch.testing.assert_close(predictor.predict(options), options.log_probability.exp())


def test_it_learns_a_rule_on_the_state_and_beats_the_draft_on_examples_it_has_not_seen() -> None:
    """The state tells acceptance, and for deep candidates it is the other way round."""

    def rule(options: NodeFeatures) -> Tensor:
        return ((options.hidden[:, 0] > options.hidden[:, 1]) ^ (options.depth > 2)).float()

    seen, unseen = features(2000), features(500, seed=1)
    predictor = trained(seen, rule(seen))
    with torch.no_grad():
        assert brier(predictor.predict(unseen), rule(unseen)) < 0.1
    assert brier(unseen.log_probability.exp(), rule(unseen)) > 0.25


def test_it_learns_from_the_aligned_probability_only_if_it_reads_that() -> None:
    seen, unseen = features(2000), features(500, seed=1)
    assert seen.aligned_log_probability is not None
    assert unseen.aligned_log_probability is not None
    labels = (seen.aligned_log_probability > -0.7).float()
    expected = (unseen.aligned_log_probability > -0.7).float()
    reads, does_not = (
        brier(trained(seen, labels, aligned_scores=which).predict(unseen), expected) for which in (True, False)
    )
    assert reads < 0.05
    assert does_not > 0.2


def test_a_temperature_repairs_an_overconfident_predictor() -> None:
    generator = torch.Generator().manual_seed(0)
    odds = 1.5 * torch.randn(20_000, generator=generator)
    labels = (torch.rand(20_000, generator=generator) < torch.sigmoid(odds)).float()
    result = calibrating_temperature(4 * odds, labels)
    assert result == pytest.approx(4, rel=0.05)
    assert calibrating_temperature(odds / 2, labels) == pytest.approx(0.5, rel=0.05)
    predictor = AcceptancePredictor(PredictorShape(WIDTH))
    options = features(20_000)._replace(log_probability=functional.logsigmoid(4 * odds))
    overconfident = brier(predictor.predict(options), labels)
    predictor.temperature.fill_(result)
    assert brier(predictor.predict(options), labels) < overconfident - 0.01


def test_a_temperature_keeps_within_bounds_where_labels_contradict_the_predictor() -> None:
    assert calibrating_temperature(torch.tensor([3.0, -3.0]), torch.tensor([0.0, 1.0])) == pytest.approx(20, rel=1e-3)
    assert calibrating_temperature(torch.tensor([3.0, -3.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.05, rel=0.1)


def test_candidates_deeper_than_any_in_training_count_as_the_deepest() -> None:
    options = features(8)
    predictor = trained(options, (options.depth > 2).float())
    with torch.no_grad():
        fourth, ninth = (predictor(options._replace(depth=torch.full((8,), depth))) for depth in (4, 9))
        first = predictor(options._replace(depth=torch.ones(8)))
    assert torch.equal(fourth, ninth)
    assert not torch.equal(fourth, first)


@pytest.mark.parametrize("value", [0.0, -1e-9, -200.0, -float("inf")])
def test_probabilities_of_zero_and_one_give_finite_odds(value: float) -> None:
    options = features(3)
    extreme = torch.full((3,), value)
    predictor = AcceptancePredictor(PredictorShape(WIDTH))
    assert predictor(options._replace(log_probability=extreme, aligned_log_probability=extreme)).isfinite().all()


def test_log_odds_are_those_of_the_probability() -> None:
    probability = torch.tensor([0.01, 0.5, 0.9])
    torch.testing.assert_close(log_odds(probability.log()), torch.logit(probability))


def test_a_predictor_of_aligned_scores_refuses_to_do_without_them() -> None:
    with pytest.raises(ValueError, match=r"reads aligned_log_probability: compute .* --no-aligned-scores"):
        AcceptancePredictor(PredictorShape(WIDTH))(features(2)._replace(aligned_log_probability=None))


def test_states_of_any_precision_and_scale_are_taken() -> None:
    options = features(50)
    predictor = trained(options, (options.hidden[:, 0] > 0).float())
    with torch.no_grad():
        plain = predictor(options)
        torch.testing.assert_close(
            predictor(options._replace(hidden=100 * options.hidden)), plain, atol=1e-3, rtol=1e-3
        )
        half = predictor(options._replace(hidden=options.hidden.bfloat16()))
    torch.testing.assert_close(half, plain, atol=0.5, rtol=0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"width": 2.5}, "width must be a whole number"),
        ({"deepest": 0}, "deepest must be"),
        ({"label": "luck"}, "label must be one of 'match', 'probability', 'ratio', got 'luck'"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(DraftTreeModelError, match=message):
        PredictorShape(**{"hidden_size": WIDTH, **changed})  # type: ignore[arg-type]
