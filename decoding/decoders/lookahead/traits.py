"""Facts about Lookahead decoding that need no model: options, knobs, rounds and their statistics. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from ...errors import ArgumentError, check_fields, one_of, whole_number
from ...rounds import Round
from ...traits import DecoderTraits, Knob

Preset = Literal["small", "large"]


@dataclass(frozen=True)
class LookaheadOptions:
    """Build options of Lookahead decoding.

    Raises:
        ValueError: a number is out of range, or there is no such preset.
    """

    max_window: int = 16
    """Upper end of the `window` knob, in columns."""
    max_ngram: int = 6
    """Upper end of the `ngram` knob, in tokens, at least 2."""
    max_guesses: int = 16
    """Upper end of the `guesses` knob; with 0 guesses nothing but the window's first row is verified."""
    preset: Preset = "small"
    """Defaults of the knobs: for small devices, or for an A100 with a 7B target (section 5 of the paper)."""

    def __post_init__(self) -> None:
        one_of("preset", self.preset, tuple(LookaheadTraits.presets))
        check_fields(self, whole_number, "max_window", "max_guesses")
        check_fields(self, partial(whole_number, at_least=2, hint="a token and the one after it"), "max_ngram")


class LookaheadTraits(DecoderTraits):
    """Facts about Lookahead decoding."""

    name = "lookahead"
    lossless = True
    verifies_trees = True
    needs_draft = False
    presets: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "small": {"window": 5, "ngram": 3, "guesses": 5},
        "large": {"window": 15, "ngram": 5, "guesses": 15},
    }
    workloads = (
        "tiny-10m/prose",
        "tiny-10m/code",
        "tiny-10m/definitions",
        "tiny-3m/prose",
        "tiny-3m/code",
        "tiny-3m/chat",
        "tiny-3m/prose@1.0",
    )
    Options = LookaheadOptions
    single_pass = True
    largest_pass = 160  # with the knobs as high as they go

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return window, n-gram size and guesses, with the defaults of the preset."""
        limits: LookaheadOptions = cls.checked_options(**options)
        usual = cls.presets[limits.preset]
        window, ngram, guesses = (
            min(usual["window"], limits.max_window),
            min(usual["ngram"], limits.max_ngram),
            min(usual["guesses"], limits.max_guesses),
        )
        return (
            Knob("window", 1, limits.max_window, window, True, "columns of the window", True),
            Knob("ngram", 2, limits.max_ngram, ngram, True, "tokens of an n-gram: the window's rows and one more"),
            Knob("guesses", 0, limits.max_guesses, guesses, True, "n-grams verified a round, at most", True),
        )


@dataclass(frozen=True)
class LookaheadRound(Round):
    """A `Round` with what is particular to Lookahead decoding.

    `drafted` counts the tokens of all guesses and of the window's first row, which are verified in the same pass;
    `draft_seconds` is the time of choosing guesses and assembling the pass, `verify_seconds` that of the rest.
    """

    available: int = 0
    """N-grams that the pool had for the current token."""
    guesses: int = 0
    """Guesses that were verified."""
    pool_size: int = 0
    """N-grams in the pool afterwards."""
    mask_seconds: float = 0.0
    """Part of `verify_seconds`: building the attention mask."""
    forward_seconds: float = 0.0
    """Part of `verify_seconds`: the target's pass, without the mask. An accelerator goes on working behind it."""
    judge_seconds: float = 0.0
    """The rest of `verify_seconds`: verification, window, pool and cache; an accelerator is waited for in it."""


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
            raise ArgumentError("LookaheadStatistics needs rounds of a LookaheadDecoder, at least one")
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
