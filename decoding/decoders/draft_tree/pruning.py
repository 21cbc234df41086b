"""Which branches of a draft tree are hopeless: cut before the draft goes on from them and the target reads them.

A pruner knows of each candidate only how likely it is to be accepted, its ancestors included, by the draft's own
probability or by an `AcceptancePredictor`. What is cut depends on nothing that the target says about the tree, so that
the output stays the target's own; see `rules.Rule.random` for what may be cut where children are drawn.

Rules that choose and verify the children of a node and keep the target's distribution.

There are three sound ways. Children drawn *independently* are verified one after another: x, drawn with probability
q(x), is accepted with probability min(1, p(x) / q(x)), and where it is not, p becomes norm(max(p - q, 0)) before the
next is tried (Miao et al., "SpecInfer", arXiv 2305.09781). Children drawn *without replacement* are verified likewise,
except that a rejected token is also taken out of q, and q renormalised (Jeon et al., "Recursive Speculative Decoding",
arXiv 2402.14160). The *likeliest* children are no random choice at all: each has the one-hot distribution of a proposal
that is certain, which comes to drawing from p and looking whether a child has that token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError
from ...sampling import draw, draw_distinct, draw_several, residual


class Randomness(NamedTuple):
    """Sources of chance in verification."""

    generator: torch.Generator
    """Generator of drawn tokens, on the device of their distribution."""
    uniform: Callable[[], float]
    """A new number in [0, 1) with every call. Thrown on the host, where children are tried one after another."""


class Rule(ABC):
    """One way to choose children and to verify them.

    Attributes:
        name: as `DraftTreeDecoder` takes it.
        random: whether which children there are is a random choice. Then none may be left out for what token it is:
            that would bend the distribution that the verification relies on.
    """

    name: ClassVar[str]
    random: ClassVar[bool]

    @abstractmethod
    def children(self, q: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Choose children of some nodes.

        Args:
            q: the draft's distribution after each node, shape (nodes, vocabulary).
            count: children a node, 1 to the vocabulary.
            generator: of the random numbers.

        Returns:
            Tokens in the order in which they are to be verified, shape (nodes, count), int64. Those that have no
            probability under q come last and are no children.
        """

    @abstractmethod
    def verify(self, p: Tensor, q: Tensor, children: Sequence[int], chance: Randomness) -> tuple[int, int]:
        """Accept one of a node's children, or none.

        Args:
            p: the target's distribution after the node, shape (vocabulary,).
            q: the draft's, from which the children were chosen, likewise.
            children: as `children` chose them.
            chance: what decides.

        Returns:
            The place of the accepted child, or -1, and the token that follows the node.
        """


class Likeliest(Rule):
    """The draft's likeliest tokens, verified as proposals that are certain."""

    name = "likeliest"
    random = False

    def children(self, q: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The likeliest first."""
        return q.topk(count, dim=-1).indices

    def verify(self, p: Tensor, q: Tensor, children: Sequence[int], chance: Randomness) -> tuple[int, int]:
        """Draw from the target, and look whether there is such a child.

        Trying child after child against what is left of p, each with a one-hot q, accepts each of them with the same
        probability.
        """
        token = int(draw(p, chance.generator))
        return (children.index(token) if token in children else -1), token


class Independent(Rule):
    """Independent draws from the draft, of which some may be the same token."""

    name = "independent"
    random = True

    def children(self, q: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """In the order of the draws."""
        return draw_several(q, count, generator)

    def verify(self, p: Tensor, q: Tensor, children: Sequence[int], chance: Randomness) -> tuple[int, int]:
        """Try child after child. On a GPU the host waits once for each that it tries."""
        for place, token in enumerate(children):
            p_of_token, q_of_token = torch.stack([p[token], q[token]]).tolist()
            if chance.uniform() * q_of_token < p_of_token:
                return place, token
            p = residual(p, q)
            q = self._left(q, token)
        return -1, int(draw(p, chance.generator))

    def _left(self, q: Tensor, token: int) -> Tensor:
        """Distribution of the next child after a rejection: unchanged, since a token may be drawn again."""
        return q


class Distinct(Independent):
    """Draws from the draft without replacement."""

    name = "distinct"

    def children(self, q: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """In the order of the draws."""
        return draw_distinct(q, count, generator)

    def _left(self, q: Tensor, token: int) -> Tensor:
        left = q.index_fill(0, torch.tensor(token, device=q.device), 0.0)
        return left / left.sum().clamp(min=torch.finfo(left.dtype).tiny)


RULES: dict[str, Rule] = {rule.name: rule for rule in (Likeliest(), Independent(), Distinct())}
"""By name."""


LOWEST, HIGHEST = 1e-4, 0.9
"""Between these a threshold adapts."""


class TreePruner(ABC):
    """Cuts a level of the tree at a time. One object serves one text.

    Attributes:
        name: as `DraftTreeDecoder` takes it.
    """

    name: ClassVar[str]

    @abstractmethod
    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """Which candidates of a level to cut.

        Args:
            scores: how likely each is to be accepted, its ancestors included, 0 to 1.
            threshold: the knob `min_acceptance_prob`, 0 to 1; with 0 nothing is cut.
        """

    def observe(self, drafted: int, cut: int, tokens: int, seconds: float) -> None:  # noqa: B027 (most learn nothing)
        """Hear what became of a round.

        Args:
            drafted: candidates, those that were cut included.
            cut: how many were.
            tokens: emitted.
            seconds: that the round took by the clock.
        """


class AbsolutePruner(TreePruner):
    """Cuts what is less likely than the threshold."""

    name = "absolute"

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """Cut by an equal threshold on every level."""
        return [score < threshold for score in scores]


class LevelPruner(TreePruner):
    """Cuts what is less likely than the threshold times the best of its level, of which something always stays."""

    name = "level"

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """A threshold for this level."""
        least = threshold * max(scores, default=0.0)
        return [score < least for score in scores]


class RatioPruner(TreePruner):
    """Adapts the threshold from round to round, until so large a share of the candidates is cut.

    Args:
        goal: share of the candidates to cut, 0 to 1.
        gain: by how much the threshold's logarithm moves when the share was off by 1.
    """

    name = "ratio"

    def __init__(self, goal: float = 0.5, gain: float = 1.0) -> None:
        if not 0 <= goal <= 1:
            raise ArgumentError(f"the goal is a share of the candidates, 0 to 1, got {goal}")
        self.goal, self._gain, self._shift = goal, gain, 0.0

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """By the knob to begin with, and then as rounds have moved it."""
        if threshold <= 0:
            return [False] * len(scores)
        start = math.log(threshold)
        self._shift = min(max(self._shift, math.log(LOWEST) - start), math.log(HIGHEST) - start)
        moved = math.exp(start + self._shift)
        return [score < moved for score in scores]

    def observe(self, drafted: int, cut: int, tokens: int, seconds: float) -> None:
        """Too few were cut: a higher threshold."""
        if drafted:
            self._shift += self._gain * (self.goal - cut / drafted)


class ThroughputPruner(TreePruner):
    """Sets the threshold where one more candidate costs what it brings, by what rounds have taken so far.

    A candidate that is accepted with probability a saves a times the seconds that a token takes, and costs what the
    round grows by. The latter is the slope of a line through the recent rounds: seconds over candidates verified. Until
    it is known, and where it is not positive, the knob's threshold holds. Decoding is as exact as ever, but what is
    drafted depends on the clock, so that a seed does not give the same rounds twice.

    Args:
        memory: rounds after which a round counts half as much.
    """

    name = "throughput"
    _FEWEST = 8

    def __init__(self, memory: float = 32.0) -> None:
        self._decay = 0.5 ** (1 / memory)
        self._rounds = 0
        self._sums = np.zeros(6)  # decayed: rounds, verified, seconds, verified^2, verified * seconds, tokens

    def observe(self, drafted: int, cut: int, tokens: int, seconds: float) -> None:
        """Add a round."""
        verified = drafted - cut
        self._sums *= self._decay
        self._sums += (1, verified, seconds, verified**2, verified * seconds, tokens)
        self._rounds += 1

    def cuts(self, scores: Sequence[float], threshold: float) -> list[bool]:
        """Seconds of one more candidate over seconds of a token."""
        if threshold <= 0:
            return [False] * len(scores)
        least = self._worth() or threshold
        return [score < least for score in scores]

    def _worth(self) -> float | None:
        rounds, verified, seconds, squares, products, tokens = self._sums
        spread = rounds * squares - verified**2
        if self._rounds < self._FEWEST or spread <= 1e-9 * rounds * squares or seconds <= 0:
            return None
        slope = (rounds * products - verified * seconds) / spread
        return float(np.clip(slope * tokens / seconds, LOWEST, HIGHEST)) if slope > 0 else None


PRUNERS: dict[str, Callable[[], TreePruner]] = {
    kind.name: kind for kind in (AbsolutePruner, LevelPruner, RatioPruner, ThroughputPruner)
}
"""By name."""
