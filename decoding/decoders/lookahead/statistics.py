"""Statistics of Lookahead decoding over some rounds: acceptance, pool and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...decoder import Round
from .decoder import LookaheadRound


@dataclass(frozen=True)
class LookaheadStatistics:
    """Means over rounds, and shares of their time.

    Attributes:
        rounds: of which these are the statistics.
        step_compression: tokens emitted a round; plain decoding has 1.
        tokens_read: by the target, a round: the extra arithmetic of a pass over that of plain decoding, which has 1.
        hit_rate: share of the rounds in which the pool knew the current token, 0 to 1.
        guesses: verified, a round.
        pool_size: n-grams in the pool, at most.
        prepare_seconds: a round, choosing guesses and assembling the pass.
        mask_seconds: a round, building the attention mask.
        forward_seconds: a round, the target's pass.
        judge_seconds: a round, verification, the window, the pool and the cache.
    """

    rounds: int
    step_compression: float
    tokens_read: float
    hit_rate: float
    guesses: float
    pool_size: int
    prepare_seconds: float
    mask_seconds: float
    forward_seconds: float
    judge_seconds: float

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> LookaheadStatistics:
        """Statistics of a generation's rounds, or of several generations' together; empty ones do not count.

        Raises:
            ValueError: there is no round, or one is of another decoder.
        """
        decoded = [round_ for round_ in rounds if round_.tokens]
        chosen = [round_ for round_ in decoded if isinstance(round_, LookaheadRound)]
        if not chosen or len(chosen) < len(decoded):
            raise ValueError("LookaheadStatistics needs rounds of a LookaheadDecoder, at least one")
        count = len(chosen)
        return cls(
            rounds=count,
            step_compression=sum(len(round_.tokens) for round_ in chosen) / count,
            tokens_read=sum(round_.target_tokens for round_ in chosen) / count,
            hit_rate=sum(round_.available > 0 for round_ in chosen) / count,
            guesses=sum(round_.guesses for round_ in chosen) / count,
            pool_size=max(round_.pool_size for round_ in chosen),
            prepare_seconds=sum(round_.draft_seconds for round_ in chosen) / count,
            mask_seconds=sum(round_.mask_seconds for round_ in chosen) / count,
            forward_seconds=sum(round_.forward_seconds for round_ in chosen) / count,
            judge_seconds=sum(round_.judge_seconds for round_ in chosen) / count,
        )
