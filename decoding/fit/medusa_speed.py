"""What heads are worth in decoding: tokens per round, what a round costs, and the speedup over plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..autoregressive import AutoregressiveDecoder
from ..decoder import Decoder
from ..medusa import MedusaDecoder, MedusaHeads
from ..pairs import Pair
from .distilled_text import DistilledText
from .prompt_windows import SPEED


@dataclass(frozen=True)
class Speed:
    """Sums over greedy generations by both decoders; seconds are of rounds, without reading prompts.

    Attributes:
        tokens: by Medusa decoding.
        rounds: by Medusa decoding.
        seconds: by Medusa decoding.
        plain_tokens: by autoregressive decoding.
        plain_seconds: by autoregressive decoding.
    """

    tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0
    plain_tokens: int = 0
    plain_seconds: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(
            self.tokens + other.tokens,
            self.rounds + other.rounds,
            self.seconds + other.seconds,
            self.plain_tokens + other.plain_tokens,
            self.plain_seconds + other.plain_seconds,
        )

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round of Medusa decoding emits, the target's own included."""
        return self.tokens / self.rounds

    @property
    def ms_per_token(self) -> float:
        """Of Medusa decoding, in milliseconds."""
        return 1000 * self.seconds / self.tokens

    @property
    def plain_ms_per_token(self) -> float:
        """Of autoregressive decoding, in milliseconds; also what one of its steps takes."""
        return 1000 * self.plain_seconds / self.plain_tokens

    @property
    def overhead(self) -> float:
        """Time of a round over that of a plain step."""
        return 1000 * self.seconds / self.rounds / self.plain_ms_per_token

    @property
    def speedup(self) -> float:
        """Time per token of plain decoding over that of Medusa decoding."""
        return self.plain_ms_per_token / self.ms_per_token


def speed_prompts(text: DistilledText, count: int) -> dict[str, list[list[int]]]:
    """Prompts to measure the speed on, by domain, as many of each as ``count`` allows and at least one."""
    found = {}
    for place, domain in enumerate(text.domains):
        rows = np.flatnonzero((text.side == SPEED) & (text.domain == place))[: max(1, count // len(text.domains))]
        found[domain] = [text.tokens[row, : text.prompts[row]].tolist() for row in rows]
    return found


def measure_speed(
    pair: Pair, heads: MedusaHeads, prompts: Mapping[str, Sequence[Sequence[int]]], size: int, new_tokens: int
) -> dict[str, Speed]:
    """Generate greedily from the same prompts with and without heads, one after the other, taking turns to be first.

    Args:
        pair: the target.
        heads: attached to it.
        prompts: by domain, token ids.
        size: candidates verified a round, at least 1.
        new_tokens: at most, after each prompt.
    """
    plain, decoder = AutoregressiveDecoder(pair), MedusaDecoder(pair, heads, max_tree=size)
    knobs = {"heads": heads.shape.heads, "tree_size": size}
    chosen: list[tuple[Decoder, Mapping[str, float]]] = [(plain, {}), (decoder, knobs)]
    for warm, values in chosen:
        warm.generate(next(iter(prompts.values()))[0], max_new_tokens=min(8, new_tokens), knobs=values)
    found = dict[str, Speed]()
    turn = itertools.count()
    for domain, rows in prompts.items():
        total = Speed()
        for row in tqdm(rows, unit="prompt", mininterval=5.0, desc=f"speed, {domain}"):
            order = chosen if next(turn) % 2 == 0 else chosen[::-1]
            made = {which.name: which.generate(row, max_new_tokens=new_tokens, knobs=values) for which, values in order}
            with_heads, without = made[decoder.name], made[plain.name]
            total += Speed(
                len(with_heads.tokens),
                len(with_heads.rounds),
                with_heads.seconds,
                len(without.tokens),
                without.seconds,
            )
        found[domain] = total
    return found
