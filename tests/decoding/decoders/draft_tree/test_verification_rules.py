"""Tokens after a node have the target's distribution, by every rule; unsound variants are detected.

Exactly: by walking every choice of children and every throw of the dice on distributions of three tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specgym.decoding.decoders.draft_tree.pruning import RULES, Distinct, Independent, Likeliest, Randomness, Rule
from specgym.decoding.sampling import draw_distinct, draw_several
from tests.helpers.branching_dice import Dice
from tests.helpers.known_distributions import Branches
from tests.helpers.tree_dice import branch_draws

P = ([0.5, 0.3, 0.2], [0.05, 0.05, 0.9], [0.0, 0.4, 0.6], [1.0, 0.0, 0.0])
Q = ([0.2, 0.5, 0.3], [0.9, 0.05, 0.05], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.3, 0.2])


class NotRenormalised(Distinct):
    """Takes a rejected token out of q, and leaves the rest of it as it was."""

    def _left(self, q: Tensor, token: int) -> Tensor:
        return q.index_fill(0, torch.tensor(token), 0.0)


class LikeliestAsDrawn(Independent):
    """Takes the draft's likeliest tokens for draws from it."""

    def children(self, q: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The likeliest first."""
        return q.topk(count, dim=-1).indices


class DistinctAsIndependent(Distinct):
    """Draws without replacement, and verifies as if each draw were from all of q."""

    def _left(self, q: Tensor, token: int) -> Tensor:
        return q


def bias(rule: Rule, p: Sequence[float], q: Sequence[float], count: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Total variation between the target's distribution and that of what follows a node."""
    walk, result = Branches(), [0.0] * len(p)
    rows = torch.tensor([p, q])
    generator = torch.Generator()
    with monkeypatch.context() as patch:
        branch_draws(patch, walk)
        for _ in walk:
            children = rule.children(rows[1:], count, generator)[0].tolist()
            possible = [token for token in children if q[token] > 0]
            place, token = rule.verify(rows[0], rows[1], possible, Randomness(generator, Dice(walk).random))
            assert place == -1 or possible[place] == token
            result[token] += walk.weight
    assert sum(result) == pytest.approx(1)
    return sum(abs(item - two) for item, two in zip(result, p, strict=True)) / 2


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_follows_a_node_has_the_target_s_distribution(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, count: int
) -> None:
    for p in P:
        for q in Q:
            assert bias(rule, p, q, count, monkeypatch) < 1e-6


@pytest.mark.parametrize(
    "rule", [NotRenormalised(), LikeliestAsDrawn(), DistinctAsIndependent()], ids=lambda rule: type(rule).__name__
)
def test_unsound_rules_are_found_out(monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    assert max(bias(rule, p, q, 3, monkeypatch) for p in P for q in Q) > 0.02


@pytest.mark.parametrize("rule", [Likeliest(), Independent(), Distinct()], ids=lambda rule: rule.name)
def test_more_children_are_accepted_more_often(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    p, q = torch.tensor(P[0]), torch.tensor(Q[0])
    accepted = []
    for count in (1, 3):
        times = 0
        for _ in range(2_000):
            children = rule.children(q[None], count, generator)[0].tolist()
            times += rule.verify(p, q, children, Randomness(generator, rng.random))[0] >= 0
        accepted.append(times)
    assert accepted[1] > accepted[0] + 100


def test_draws_without_replacement_are_distinct_and_come_as_if_drawn_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = draw_distinct(q.expand(40_000, 4), 2, generator)
    assert (draws[:, 0] != draws[:, 1]).all()
    for first in range(4):
        for second in set(range(4)) - {first}:
            expected = float(q[first] * q[second] / (1 - q[first]))
            share = float(((draws[:, 0] == first) & (draws[:, 1] == second)).float().mean())
            assert share == pytest.approx(expected, abs=0.01)


def test_tokens_without_probability_come_last_where_draws_run_out() -> None:
    q = torch.tensor([[0.0, 0.7, 0.0, 0.3]]).expand(50, 4)
    draws = draw_distinct(q, 4, torch.Generator().manual_seed(0))
    assert {frozenset(row[:2]) for row in draws.tolist()} == {frozenset({1, 3})}


def test_independent_draws_follow_the_distribution_and_never_take_what_is_impossible() -> None:
    q = torch.tensor([[0.0, 0.7, 0.3], [1.0, 0.0, 0.0]])
    draws = draw_several(q, 20_000, torch.Generator().manual_seed(0))
    assert draws.shape == (2, 20_000)
    assert (draws[1] == 0).all()
    assert not (draws[0] == 0).any()
    assert float((draws[0] == 1).float().mean()) == pytest.approx(0.7, abs=0.015)
