"""Rules that choose and verify the children of a node and keep the target's distribution.

There are three sound ways. Children drawn *independently* are verified one after another: x, drawn with probability
q(x), is accepted with probability min(1, p(x) / q(x)), and where it is not, p becomes norm(max(p - q, 0)) before the
next is tried (Miao et al., "SpecInfer", arXiv 2305.09781). Children drawn *without replacement* are verified likewise,
except that a rejected token is also taken out of q, and q renormalised (Jeon et al., "Recursive Speculative Decoding",
arXiv 2402.14160). The *likeliest* children are no random choice at all: each has the one-hot distribution of a proposal
that is certain, which comes to drawing from p and looking whether a child has that token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

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
