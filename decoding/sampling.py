"""Choice of tokens: warping of logits, distances between distributions, the exact acceptance test.

Pure functions over tensors. Distributions are float32 rows that sum to one, of shape (..., vocabulary). The acceptance
test and the residual are those of Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .errors import check_fields, number, whole_number

if TYPE_CHECKING:  # importing torch takes seconds, and a replay needs `Sampling` alone
    import torch
    from torch import Tensor

_COLDEST = 1e-30  # logits divided by less overflow


@dataclass(frozen=True)
class Sampling:
    """A sampling setting, applied in the order temperature, top-k, top-p (as in transformers).

    Args:
        temperature: 0 is greedy decoding; otherwise the logits are divided by it.
        top_k: keep only this many of the likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this; 1 keeps all.

    Raises:
        ArgumentError: a setting is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, partial(number, at_least=0), "temperature")
        if self.temperature:
            check_fields(self, partial(number, at_least=_COLDEST, hint="or 0 for greedy decoding"), "temperature")
        check_fields(self, partial(whole_number, at_least=0, hint="0 for no limit"), "top_k")
        check_fields(self, partial(number, above=0, at_most=1), "top_p")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that tokens are drawn from.

        Args:
            logits: shape (..., vocabulary).

        Returns:
            float32, same shape, rows summing to one; one-hot at the argmax when greedy.
        """
        logits = logits.float()
        if self.greedy:
            choice = logits.argmax(-1, keepdim=True)
            return logits.new_zeros(logits.shape).scatter_(-1, choice, 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest_kept = logits.topk(int(self.top_k), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest_kept, -math.inf)
        if self.top_p < 1:
            ascending, order = logits.sort(dim=-1)
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[..., -1] = False  # the likeliest token always stays
            logits = logits.masked_fill(dropped.new_zeros(dropped.shape).scatter_(-1, order, dropped), -math.inf)
        return logits.softmax(-1)


GREEDY = Sampling(temperature=0.0)


def likeliest_of_ten(scores: Tensor) -> Tensor:
    """The likeliest token's probability among the ten likeliest alone, at temperature 1 and before any warping.

    Args:
        scores: logits, shape (..., vocabulary).

    Returns:
        Shape (...,), from 0.1 (a tenth of ten equal ones) to 1.
    """
    return scores.float().topk(min(10, scores.shape[-1]), dim=-1).values.softmax(-1)[..., 0]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the L1 distance of two distributions, in [0, 1]. Shapes (..., vocabulary) to (...)."""
    return (p - q).abs().sum(-1).mul(0.5).clamp(max=1.0)


def accepts(p_of_token: Tensor, q_of_token: Tensor | float, uniform: Tensor | float) -> Tensor:
    """The exact acceptance test: a token drafted with probability q is kept with probability min(1, p / q).

    Written without a division, so that q = 0 (a token that the draft could not have proposed) needs no special case.
    """
    return uniform * q_of_token < p_of_token


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Distribution that remains after a rejection: norm(max(p - q, 0)), or p where that is empty.

    The difference is empty only when p equals q up to rounding, where no rejection should have happened.
    """
    excess = (p - q).clamp(min=0.0)
    mass = excess.sum(-1, keepdim=True)
    return (excess / mass.clamp(min=1e-9)).where(mass > 1e-9, p)


def residual_of_token(p: Tensor, token: Tensor) -> Tensor:
    """The residual for a deterministic draft, whose q is one-hot: p without `token`, renormalised.

    Args:
        p: shape (..., vocabulary).
        token: shape (...), the rejected token.
    """
    one_hot = p.new_zeros(p.shape).scatter_(-1, token.unsqueeze(-1), 1.0)
    return residual(p, one_hot)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token a row, shape (..., vocabulary) to (...), without waiting for the device."""
    return draw_several(probabilities, 1, generator).squeeze(-1)


def draw_several(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Independent tokens of each row, shape (..., vocabulary) to (..., count), without waiting for the device.

    Inverts the cumulative distribution, in float64 where there is one. That takes a random number a draw, where
    `torch.multinomial` takes one a token (7 times slower for 4,096 tokens on a CPU).
    """
    import torch

    precise = torch.float32 if probabilities.device.type == "mps" else torch.float64
    cumulative = probabilities.cumsum(-1, dtype=precise)
    uniform = torch.rand(
        (*probabilities.shape[:-1], count), dtype=precise, device=probabilities.device, generator=generator
    )
    # From the right, so that no token of probability 0 is taken; the clamp is for NaN, which whoever calls refuses.
    place = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
    return place.clamp_(max=probabilities.shape[-1] - 1)


def draw_distinct(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Tokens of each row drawn one after another without putting any back, in that order.

    By a race of exponential clocks, the first to ring first: as draws would come out if each drawn token were taken
    out and the rest renormalised.

    Args:
        probabilities: shape (..., vocabulary).
        count: draws a row, at most the vocabulary. Where fewer tokens have a probability, those without come last.
        generator: of the random numbers.

    Returns:
        Shape (..., count), int64.
    """
    import torch

    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / clocks).topk(count, dim=-1).indices
