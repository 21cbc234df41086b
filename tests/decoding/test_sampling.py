"""Warping, distances, the acceptance test, the residual and drawing, for distributions of every shape."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specgym.decoding.sampling import Sampling, accepts, draw, residual, residual_of_token, total_variation

VOCABULARY = 12


@st.composite
def logits(draw_from: st.DrawFn, rows: int = 1) -> Tensor:
    """Logits without ties, flat to extremely peaked, some tokens impossible."""
    seed = draw_from(st.integers(0, 10**6))
    spread = draw_from(st.sampled_from([0.1, 1.0, 5.0, 40.0]))
    impossible = draw_from(st.integers(0, VOCABULARY - 1))
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(rows, VOCABULARY, generator=generator)
    for row in scores:
        row[torch.randperm(VOCABULARY, generator=generator)[:impossible]] = -math.inf
    return scores


@st.composite
def distributions(draw_from: st.DrawFn, rows: int = 1) -> Tensor:
    """Rows that sum to one, some of them one-hot."""
    return draw_from(logits(rows)).softmax(-1)


@given(logits(3), st.sampled_from([0.3, 0.7, 1.0, 2.0]), st.integers(0, 15), st.sampled_from([0.2, 0.9, 1.0]))
def test_warping_equals_that_of_transformers(scores: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = scores.clone()
    for warper in warpers:
        expected = warper(None, expected)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).probabilities(scores), expected.softmax(-1))


@given(logits(2), st.sampled_from([1e-3, 0.5, 1.0, 100.0]), st.integers(0, 15), st.sampled_from([1e-6, 0.5, 1.0]))
def test_warped_rows_are_distributions_within_top_k(
    scores: Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    p = Sampling(temperature, top_k, top_p).probabilities(scores)
    assert p.dtype == torch.float32
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    if top_k:
        assert ((p > 0).sum(-1) <= top_k).all()
    torch.testing.assert_close(p.argmax(-1), scores.argmax(-1))


@given(logits(2))
def test_greedy_is_one_hot_at_the_argmax(scores: Tensor) -> None:
    p = Sampling(temperature=0.0).probabilities(scores)
    torch.testing.assert_close(p, torch.nn.functional.one_hot(scores.argmax(-1), VOCABULARY).float())


def test_probabilities_do_not_change_the_logits_and_are_float32_for_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scores = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
        p = Sampling(0.5, top_k=2, top_p=0.9).probabilities(scores)
        assert p.dtype == torch.float32
        assert scores.tolist() == [1.0, 2.0, 3.0]


def test_a_temperature_near_zero_is_nearly_greedy_and_not_nan() -> None:
    p = Sampling(temperature=1e-30).probabilities(torch.tensor([-300.0, 3.0, 3.001, 200.0]))
    assert p.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-42}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": math.nan}, "top_k"),
        ({"top_k": math.inf}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_a_whole_top_k_given_as_a_float_works() -> None:
    p = Sampling(top_k=2.0).probabilities(torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[arg-type]
    assert (p > 0).tolist() == [False, True, True]


@given(distributions(3))
def test_total_variation_is_a_metric_bounded_by_one(rows: Tensor) -> None:
    p, q, r = rows
    assert 0 <= total_variation(p, q) <= 1
    assert total_variation(p, p) == 0
    assert total_variation(p, q) == total_variation(q, p)
    assert total_variation(p, r) <= total_variation(p, q) + total_variation(q, r) + 1e-6
    torch.testing.assert_close(total_variation(p, q), 1 - torch.minimum(p, q).sum(), atol=1e-6, rtol=0)


def test_total_variation_of_disjoint_distributions_is_one() -> None:
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1


@given(distributions(2))
def test_acceptance_and_residual_together_give_the_target(rows: Tensor) -> None:
    p, q = rows
    accepted = torch.minimum(p, q)
    owed = residual(p, q)
    torch.testing.assert_close(owed.sum(), torch.tensor(1.0), atol=1e-5, rtol=0)
    assert (owed >= 0).all()
    torch.testing.assert_close(accepted + (1 - accepted.sum()) * owed, p, atol=2e-6, rtol=0)


@given(distributions(1), st.integers(0, VOCABULARY - 1))
def test_a_one_hot_draft_leaves_the_target_without_its_token(rows: Tensor, token: int) -> None:
    p = rows[0]
    owed = residual_of_token(p, torch.tensor(token))
    one_hot = torch.zeros(VOCABULARY)
    one_hot[token] = 1
    torch.testing.assert_close(owed, residual(p, one_hot))
    torch.testing.assert_close(p[token] * one_hot + (1 - p[token]) * owed, p, atol=1e-6, rtol=0)
    if p[token] < 0.999:
        assert owed[token] == 0


@given(distributions(1))
def test_the_residual_of_equal_distributions_is_the_target(rows: Tensor) -> None:
    assert torch.equal(residual(rows[0], rows[0]), rows[0])


def test_a_nan_draft_is_never_accepted_and_owes_the_target() -> None:
    p = torch.tensor([0.25, 0.75])
    broken = torch.full((2,), math.nan)
    assert not accepts(p, broken, torch.zeros(2)).any()
    assert torch.equal(residual(p, broken), p)


@settings(max_examples=30)
@given(st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_a_token_is_accepted_with_probability_p_over_q(p: float, q: float) -> None:
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    share = accepts(torch.tensor(p), torch.tensor(q), uniform).float().mean()
    assert abs(share.item() - min(1, p / q)) < 1e-3


def test_acceptance_at_the_edges() -> None:
    item, zero = torch.tensor(1.0), torch.tensor(0.0)
    almost_one = torch.tensor(1 - 2**-24)
    assert accepts(item, 1.0, almost_one)  # a sure token is always kept
    assert not accepts(zero, 0.5, zero)  # an impossible token never, not even at u = 0
    assert accepts(torch.tensor(1e-30), 0.5, zero)


@pytest.mark.parametrize("vocabulary", [2, 7, 300])
def test_draws_follow_the_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(5)
    p = torch.randn(vocabulary, generator=generator).mul(2).softmax(-1)
    drawn = draw(p.expand(100_000, -1).contiguous(), generator)
    counts = torch.bincount(drawn, minlength=vocabulary).double()
    # Rare tokens are pooled, so that every class has an expected count of at least 5.
    expected = p.double() / p.double().sum() * 100_000
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    some = expected > 0
    assert (observed[~some] == 0).all()
    assert stats.chisquare(observed[some], expected[some]).pvalue > 1e-3


def test_draw_never_takes_an_impossible_token_and_keeps_the_shape() -> None:
    p = torch.zeros(4, 50_000, 8)
    p[..., 3], p[..., 6] = 1e-30, 1 - 1e-30
    drawn = draw(p, torch.Generator().manual_seed(0))
    assert drawn.shape == (4, 50_000)
    assert drawn.unique().tolist() == [6]


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.2499, 1), (0.25, 2), (1 - 2**-53, 2)])
def test_draw_at_the_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch, uniform: float, token: int) -> None:
    def rand(shape: tuple[int, ...], **options: Any) -> Tensor:
        return torch.full(shape, uniform, dtype=options["dtype"])

    monkeypatch.setattr(torch, "rand", rand)
    assert draw(torch.tensor([0.0, 0.25, 0.75, 0.0])) == token


def test_draw_from_nan_gives_a_valid_id() -> None:
    assert 0 <= draw(torch.full((5,), math.nan)) < 5


def test_the_same_seed_draws_the_same_tokens() -> None:
    p = torch.rand(50, 30).softmax(-1)
    assert torch.equal(draw(p, torch.Generator().manual_seed(3)), draw(p, torch.Generator().manual_seed(3)))
