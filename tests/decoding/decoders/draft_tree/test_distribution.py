"""Samples of draft trees follow the target's distribution, by every rule and with pruning on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from specgym.decoding.decoder import Session
from specgym.decoding.decoders.draft_tree import pruning as rules
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder
from specgym.decoding.decoders.draft_tree.pruning import Distinct, Independent, Likeliest
from specgym.decoding.drafts.drafter import ModelDrafter
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from tests.helpers.branching_dice import Dice
from tests.helpers.first_tokens import ROUNDING, SIGNIFICANCE, Knobs, Walker, assert_texts_follow_the_target, sampled
from tests.helpers.known_distributions import SAMPLINGS, Branches
from tests.helpers.other_words import translated_twin
from tests.helpers.table_models import TableModel, random_table
from tests.helpers.tree_dice import branch_draws


class TreeWalker(Walker):
    """Children, throws of the dice and the target's own tokens. Two tokens are as many as can be walked in seconds."""

    prompt = (0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1)

    def branch(self, patch: pytest.MonkeyPatch, walk: Branches) -> None:
        """Every draw."""
        branch_draws(patch, walk)

    def begin(self, session: Session, walk: Branches) -> None:
        """Every throw."""
        session._rng = Dice(walk)


@pytest.fixture
def walker(monkeypatch: pytest.MonkeyPatch) -> Walker:
    return TreeWalker(monkeypatch)


def small(number: int) -> Mapping[str, float]:
    """Two levels, a node of the second one without children."""
    return {"max_candidates": 2, "max_depth": 2, "node_budget": 4}


def pruned(number: int) -> Mapping[str, float]:
    return {**small(number), "min_acceptance_prob": 0.45}


def chain(number: int) -> Mapping[str, float]:
    return {"max_candidates": 1, "max_depth": 2, "node_budget": 2}


def pruned_chain(number: int) -> Mapping[str, float]:
    return {**chain(number), "min_acceptance_prob": 0.45}


def large(number: int) -> Mapping[str, float]:
    return {"max_candidates": 4, "max_depth": 2, "node_budget": 12, "min_acceptance_prob": 0.25}


def changing(number: int) -> Mapping[str, float]:
    """Other knobs in every round."""
    return (
        {"max_candidates": 3, "max_depth": 3, "node_budget": 12, "min_acceptance_prob": 0.1},
        {"max_candidates": 1, "max_depth": 2, "node_budget": 2, "min_acceptance_prob": 0.0},
        {"max_candidates": 2, "max_depth": 4, "node_budget": 5, "min_acceptance_prob": 0.3},
        {"node_budget": 0},
    )[number % 4]


def pair_of(vocabulary: int) -> Pair:
    """A draft that knows something of the target, and is often wrong."""
    target, mine = (random_table(vocabulary, seed, 1.2) for seed in (1, 2))
    return Pair(TableModel(target), TableModel(0.5 * target + 0.7 * mine))


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("knobs", [small, pruned])
def test_sampling_is_exact(walker: Walker, rule: str, knobs: Knobs) -> None:
    assert walker.strays(DraftTreeDecoder(pair_of(2), rule), Sampling(1.1), knobs) < ROUNDING
    assert min(walker.accepted, walker.rejected) > 0.5


@pytest.mark.parametrize("rule", rules.RULES)
def test_sampling_is_exact_with_the_draft_of_another_tokenizer(walker: Walker, rule: str) -> None:
    target = TableModel(random_table(3, 1, 1.2))
    pair = Pair(target, ModelDrafter(translated_twin(target, 0.5)))
    assert walker.strays(DraftTreeDecoder(pair, rule), Sampling(1.1), small) < ROUNDING
    assert min(walker.accepted, walker.rejected) > 0.3


class CutByToken(Independent):
    """Leaves drawn children out for what token they are: the mistake of pruning them by their probability."""

    name = "cut by token"
    random = False


class AcceptsTheLast(Likeliest):
    """Follows the last child where the target chose none."""

    name = "accepts the last"

    def verify(self, p: Any, q: Any, children: Any, chance: rules.Randomness) -> tuple[int, int]:
        """Never ends a path before a leaf."""
        place, _ = super().verify(p, q, children, chance)
        place = place if place >= 0 else len(children) - 1
        return place, children[place]


class ForgetsTheRejected(Distinct):
    """Draws the target's own token from p, whatever was rejected before."""

    name = "forgets the rejected"

    def verify(self, p: Any, q: Any, children: Any, chance: rules.Randomness) -> tuple[int, int]:
        """Without the residual."""
        place, token = super().verify(p, q, children, chance)
        return (place, token) if place >= 0 else (-1, int(rules.draw(p, chance.generator)))


@pytest.mark.parametrize(
    ("wrong", "knobs", "of_four"),
    [(CutByToken(), pruned_chain, large), (AcceptsTheLast(), small, large), (ForgetsTheRejected(), chain, chain)],
    ids=lambda item: getattr(item, "name", ""),
)
def test_unsound_verification_is_found_out_both_ways(
    monkeypatch: pytest.MonkeyPatch, walker: Walker, wrong: rules.Rule, knobs: Knobs, of_four: Knobs
) -> None:
    monkeypatch.setitem(rules.RULES, wrong.name, wrong)
    assert walker.strays(DraftTreeDecoder(pair_of(2), wrong.name), Sampling(), knobs) > 0.005
    assert sampled(DraftTreeDecoder(pair_of(4), wrong.name), Sampling(), 500, of_four)[0] < SIGNIFICANCE / 1000


CASES: dict[str, tuple[str, str, str | None, Knobs]] = {
    "likeliest, plain": ("likeliest", "plain", "absolute", changing),
    "likeliest, all": ("likeliest", "all", "ratio", changing),
    "independent, plain": ("independent", "plain", "absolute", changing),
    "independent, top-k": ("independent", "top-k", "level", changing),
    "distinct, plain": ("distinct", "plain", "ratio", changing),
    "distinct, top-p": ("distinct", "top-p", "absolute", changing),
    "distinct, hot": ("distinct", "hot", "throughput", changing),
}


@pytest.mark.parametrize(("rule", "name", "pruning", "knobs"), CASES.values(), ids=CASES.keys())
def test_sampled_texts_follow_the_target(rule: str, name: str, pruning: str | None, knobs: Knobs) -> None:
    draft_sampling = Sampling(0.8, top_k=3) if name == "top-p" else Sampling(0.8)
    decoder = DraftTreeDecoder(pair_of(4), rule, pruning=pruning, draft_sampling=draft_sampling)
    assert_texts_follow_the_target(decoder, SAMPLINGS[name], 500, knobs)
