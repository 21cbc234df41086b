"""Facts about Lookahead decoding that need no model. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from ...errors import check_fields, one_of, whole_number
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
