"""What a decoder is worth: tokens per round, what a round costs, and the speedup over plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..decoder import Decoder, Generation
from ..decoders.autoregressive import AutoregressiveDecoder

COLUMNS = ("tokens a round", "overhead of a round", "ms a token", "plain ms a token", "speedup")
"""What `Speed.cells` gives."""


@dataclass(frozen=True)
class Speed:
    """Sums over greedy generations by two decoders; seconds are of rounds, without reading prompts.

    Attributes:
        tokens: by the decoder in question.
        rounds: by the decoder in question.
        seconds: by the decoder in question.
        plain_tokens: by autoregressive decoding.
        plain_seconds: by autoregressive decoding.
    """

    tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0
    plain_tokens: int = 0
    plain_seconds: float = 0.0

    @classmethod
    def of(cls, made: Generation, plain: Generation) -> Speed:
        """Of one prompt."""
        return cls(len(made.tokens), len(made.rounds), made.seconds, len(plain.tokens), plain.seconds)

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
        """Tokens that a round emits, the target's own included."""
        return self.tokens / self.rounds

    @property
    def ms_per_token(self) -> float:
        """Of the decoder in question, in milliseconds."""
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
        """Time per token of plain decoding over that of the decoder in question."""
        return self.plain_ms_per_token / self.ms_per_token

    def cells(self) -> list[str]:
        """The numbers of a row of a table, by `COLUMNS`."""
        ratios = f"{self.tokens_per_round:.2f}", f"{self.overhead:.2f}"
        return [*ratios, f"{self.ms_per_token:.2f}", f"{self.plain_ms_per_token:.2f}", f"{self.speedup:.2f}"]


def compare(
    decoder: Decoder, knobs: Mapping[str, float], prompts: Mapping[str, Sequence[Sequence[int]]], new_tokens: int
) -> Iterator[tuple[str, Generation, Generation]]:
    """Generate greedily from the same prompts by two decoders, one after the other, taking turns to be first.

    Args:
        decoder: in question; the other is plain decoding of its pair.
        knobs: of the decoder.
        prompts: by domain, token ids.
        new_tokens: at most, after each prompt.

    Yields:
        For each prompt its domain, what the decoder made of it, and what plain decoding did.
    """
    plain = AutoregressiveDecoder(decoder.pair)
    chosen: list[tuple[Decoder, Mapping[str, float]]] = [(plain, {}), (decoder, knobs)]
    for warm, values in chosen:
        warm.generate(next(iter(prompts.values()))[0], max_new_tokens=min(8, new_tokens), knobs=values)
    turn = itertools.count()
    for domain, rows in prompts.items():
        for row in tqdm(rows, unit="prompt", mininterval=5.0, desc=f"speed, {domain}"):
            order = chosen if next(turn) % 2 == 0 else chosen[::-1]
            made = {which: which.generate(row, max_new_tokens=new_tokens, knobs=values) for which, values in order}
            yield domain, made[decoder], made[plain]
