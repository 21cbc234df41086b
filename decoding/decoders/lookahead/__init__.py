"""Lookahead decoding: several steps ahead in parallel, verified against the target itself, without any draft model."""

from .decoder import JacobiDecoder, LookaheadDecoder, LookaheadRound, LookaheadSession, lookahead_knobs
from .pool import NGramPool, PoolSettings
from .statistics import LookaheadStatistics

__all__ = [
    "JacobiDecoder",
    "LookaheadDecoder",
    "LookaheadRound",
    "LookaheadSession",
    "LookaheadStatistics",
    "NGramPool",
    "PoolSettings",
    "lookahead_knobs",
]
