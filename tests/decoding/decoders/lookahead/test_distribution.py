"""Samples of Lookahead decoding follow the target's distribution, whatever the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from specgym.decoding.decoder import Session
from specgym.decoding.decoders.lookahead import decoder as module
from specgym.decoding.decoders.lookahead.decoder import JacobiDecoder, LookaheadDecoder
from specgym.decoding.decoders.lookahead.pool import PoolSettings
from specgym.decoding.decoders.lookahead.window import Accepted, follow
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.sampling import Sampling
from tests.helpers.branching_dice import Dice
from tests.helpers.first_tokens import ROUNDING, Knobs, Walker, assert_found_out, assert_texts_follow_the_target
from tests.helpers.known_distributions import SAMPLINGS, Branches

POOLS = {
    "usual": PoolSettings(),
    "unseeded": PoolSettings(seeds="nothing"),
    "prompt": PoolSettings(seeds="prompt", per_key=3),
    "frequency": PoolSettings(retention="frequency", per_key=2),
    "sliding": PoolSettings(retention="sliding", horizon=4, max_keys=2),
    "top share": PoolSettings(top_share=0.5),
    "overlap": PoolSettings(max_overlap=0.4),
    "two stages": PoolSettings(min_acceptance=0.5),
    "all": PoolSettings(
        "prompt",
        "sliding",
        11,
        2,
        4,
        top_share=0.9,
        max_overlap=0.5,
        min_acceptance=0.1,
        ranking="learned",
        chunk_tokens=2,
    ),
}
MakeTable = Callable[..., LanguageModel]


def of_shape(window: int, ngram: int, guesses: int) -> Knobs:
    return lambda number: {"window": window, "ngram": ngram, "guesses": guesses}


def changing(number: int) -> Mapping[str, float]:
    """Other knobs in every round."""
    return (
        {"window": 3, "ngram": 3, "guesses": 4},
        {"window": 1, "ngram": 4, "guesses": 2},
        {"window": 4, "ngram": 2},
    )[number % 3]


class LookaheadWalker(Walker):
    """Lookahead decoding draws the target's own tokens, and throws dice for the guesses."""

    def branch(self, patch: pytest.MonkeyPatch, walk: Branches) -> None:
        """A token of the target's own is a branch."""

        def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.tensor(walk.choose((p.double() / p.double().sum()).tolist()))

        patch.setattr(module, "draw", draw)

    def begin(self, session: Session, walk: Branches) -> None:
        """A throw is a branch."""
        session._rng = Dice(walk)


@pytest.fixture
def walker(monkeypatch: pytest.MonkeyPatch) -> Walker:
    return LookaheadWalker(monkeypatch)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_sampling_is_exact_with_windows_of_every_shape(
    walker: Walker, make_table: MakeTable, sampling: Sampling
) -> None:
    decoder = LookaheadDecoder(Pair(make_table(3, seed=1, spread=1.2)))
    for knobs in (of_shape(1, 2, 0), of_shape(4, 2, 0), of_shape(1, 3, 3), of_shape(3, 4, 2), changing):
        assert walker.strays(decoder, sampling, knobs) < ROUNDING
    assert walker.accepted > 1
    assert walker.rejected > 1


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_sampling_is_exact_with_every_option_of_the_pool(
    walker: Walker, make_table: MakeTable, pool: PoolSettings
) -> None:
    decoder = LookaheadDecoder(Pair(make_table(3, seed=1, spread=1.2)), pool=pool)
    for sampling in (Sampling(), Sampling(0.7, top_p=0.9)):
        for knobs in (of_shape(2, 3, 3), changing):
            assert walker.strays(decoder, sampling, knobs) < ROUNDING


def test_jacobi_sampling_is_exact(walker: Walker, make_table: MakeTable) -> None:
    decoder = JacobiDecoder(Pair(make_table(3, seed=1, spread=1.2)))
    assert walker.strays(decoder, Sampling(), lambda number: {"window": 4}) < ROUNDING
    assert walker.accepted > 0.1


def keeps_rejected(*arguments: Any) -> Accepted:
    """Afterwards the token comes from the whole distribution, as if nothing had been rejected."""
    return follow(*arguments)._replace(rejected=[])


def divides(guesses: Any, chances: Any, uniform: Any) -> Accepted:
    """Accepts with min(1, p / q), as if the guess had been drawn with a probability of a half."""
    return follow(guesses, [[min(1.0, 2 * chance) for chance in row] for row in chances], uniform)


@pytest.mark.parametrize("wrong", [keeps_rejected, divides])
def test_a_wrong_verification_is_found_out_both_ways(
    monkeypatch: pytest.MonkeyPatch, walker: Walker, make_table: MakeTable, wrong: Callable[..., Accepted]
) -> None:
    monkeypatch.setattr(module, "follow", wrong)
    small, large = (LookaheadDecoder(Pair(make_table(size, seed=1, spread=1.2))) for size in (3, 4))
    assert_found_out(walker, small, large, 400, of_shape(3, 3, 4))


CASES: dict[str, tuple[str, str, Knobs]] = {
    "hot": ("hot", "usual", of_shape(5, 3, 5)),
    "top-k": ("top-k", "usual", of_shape(16, 6, 16)),
    "top-p, every option": ("top-p", "all", changing),
    "frequency": ("plain", "frequency", of_shape(2, 5, 7)),
    "two stages": ("all", "two stages", of_shape(8, 3, 16)),
}


@pytest.mark.parametrize(("name", "pool", "knobs"), CASES.values(), ids=CASES.keys())
def test_sampled_texts_follow_the_target(make_table: MakeTable, name: str, pool: str, knobs: Knobs) -> None:
    decoder = LookaheadDecoder(Pair(make_table(4, seed=4, spread=1.2)), pool=POOLS[pool])
    # Of so many texts the wrong verifications above have p values of 1e-26 and less in each of these cases.
    assert_texts_follow_the_target(decoder, SAMPLINGS[name], 500, knobs)
