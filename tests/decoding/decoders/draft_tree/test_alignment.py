"""The affine map: least squares find it, whatever parts the states come in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment, DraftTreeModelError, RidgeFit, proposals
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.output_layer import output_layer

DRAFT, TARGET = 5, 7


def mapped(count: int, noise: float = 0.0, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States of a draft, those of a target made of them, and the map in between."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(TARGET, DRAFT, generator=generator), torch.randn(TARGET, generator=generator)
    draft = torch.randn(count, DRAFT, generator=generator) + offset
    target = draft @ weight.T + bias + noise * torch.randn(count, TARGET, generator=generator)
    return draft, target, weight, bias


def fitted(draft: Tensor, target: Tensor, penalty: float, parts: int = 1) -> AffineAlignment:
    fit = RidgeFit(draft.shape[1], target.shape[1])
    for item, other in zip(draft.tensor_split(parts), target.tensor_split(parts), strict=True):
        fit.add(item, other)
    assert fit.count == len(draft)
    return fit.solve(penalty)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_least_squares_recover_the_map_between_drafts_and_targets_of_other_widths(offset: float) -> None:
    draft, target, weight, bias = mapped(50, offset=offset)
    result = fitted(draft, target, 0.0)
    torch.testing.assert_close(result.weight, weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(result(draft), target, atol=1e-3, rtol=1e-3)
    if not offset:
        torch.testing.assert_close(result.bias, bias, atol=1e-4, rtol=1e-4)


def test_states_in_parts_give_the_map_of_all_at_once() -> None:
    draft, target, _, _ = mapped(64, noise=0.5, offset=2.0)
    whole, parts = fitted(draft, target, 0.01), fitted(draft, target, 0.01, parts=9)
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(parts.bias, whole.bias, atol=1e-6, rtol=1e-6)


def test_noisy_states_give_what_a_solver_of_least_squares_gives() -> None:
    draft, target, _, _ = mapped(40, noise=1.0)
    result = fitted(draft, target, 0.0)
    solved = torch.linalg.lstsq(torch.cat([draft, torch.ones(40, 1)], dim=1), target).solution
    torch.testing.assert_close(result.weight, solved[:-1].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.bias, solved[-1], atol=1e-4, rtol=1e-4)


def test_a_penalty_shrinks_the_weights_and_leaves_the_mean_where_it_is() -> None:
    draft, target, _, _ = mapped(60, noise=0.2, offset=3.0)
    free, shrunk = fitted(draft, target, 0.0), fitted(draft, target, 1.0)
    assert shrunk.weight.norm() < 0.8 * free.weight.norm()
    torch.testing.assert_close(shrunk(draft).mean(0), target.mean(0), atol=1e-4, rtol=1e-4)


def test_a_penalty_means_the_same_for_every_scale_and_amount_of_text() -> None:
    draft, target, _, _ = mapped(60, noise=0.2)
    once, twice = fitted(draft, target, 0.5), fitted(draft.repeat(2, 1), target.repeat(2, 1), 0.5)
    torch.testing.assert_close(twice.weight, once.weight)
    torch.testing.assert_close(fitted(10 * draft, target, 0.5)(10 * draft), once(draft), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_fitted_is_refused_with_the_way_out() -> None:
    draft, target, _, _ = mapped(3)
    with pytest.raises(DraftTreeModelError, match="3 pairs of states do not determine a map of 5 features: give more"):
        fitted(draft, target, 0.0)
    assert fitted(draft, target, 1e-3)(draft).isfinite().all()
    with pytest.raises(DraftTreeModelError, match="call add first"):
        RidgeFit(2, 2).solve()
    for penalty in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="penalty must be a finite number of at least 0"):
            fitted(draft, target, penalty)
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(3, 7\), got \(3, 5\) and \(3, 7\)"):
        RidgeFit(4, TARGET).add(draft, target)
    with pytest.raises(ValueError, match="states must have the shapes"):
        RidgeFit(DRAFT, TARGET).add(draft, target[:2])


def test_states_of_another_width_are_refused_and_of_another_precision_are_taken() -> None:
    alignment = AffineAlignment(DRAFT, TARGET)
    with pytest.raises(DraftTreeModelError, match="maps states of width 5, and those given have 7; fit one"):
        alignment(torch.zeros(2, 7))
    states = torch.randn(2, 3, DRAFT).half()
    assert alignment(states).shape == (2, 3, TARGET)
    assert alignment(states).dtype == torch.float32


def test_a_map_that_is_not_fitted_changes_nothing_where_the_widths_are_one() -> None:
    states = torch.randn(4, DRAFT)
    assert torch.equal(AffineAlignment(DRAFT, DRAFT)(states), states)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_proposals_of_states_that_are_the_targets_own_are_its_own_logits(
    make_model: Callable[..., PreTrainedModel], family: str
) -> None:
    target = LanguageModel(make_model(family), prepack=False)
    read = target.fresh().forward(torch.tensor([3, 1, 4, 1, 5]), hidden=True)
    assert read.hidden is not None
    alignment = AffineAlignment(target.hidden_size, target.hidden_size)
    with torch.no_grad():
        result = proposals(alignment(read.hidden), output_layer(target.model))
    torch.testing.assert_close(result, read.scores, atol=1e-4, rtol=1e-4)
