"""Facts about the decoders that verify chains of draft tokens. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from ..errors import check_fields, one_of, whole_number
from ..traits import EXACT, DecoderTraits, Knob, TraceRule


@dataclass(frozen=True)
class ChainOptions:
    """Build options of decoders that draft chains.

    Raises:
        ValueError: the length is not positive.
    """

    max_draft_length: int = 16
    """Longest draft, in tokens."""

    def __post_init__(self) -> None:
        check_fields(self, whole_number, "max_draft_length")


Stop = Literal["expected-gain", "never"]


@dataclass(frozen=True)
class ThresholdOptions(ChainOptions):
    """Build options of threshold decoding.

    Raises:
        ValueError: the length is not positive, or there is no such rule.
    """

    stop: Stop = "expected-gain"
    """End of drafts: as soon as one more token is expected to bring less than it costs by the pair's latency profile,
    or never before --max-draft-length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("stop", self.stop, get_args(Stop))


class SpeculativeTraits(DecoderTraits):
    """Facts about exact speculative sampling."""

    name = "speculative"
    lossless = True
    recorded_by = "trace"
    Options = ChainOptions
    workloads = (
        "tiny/prose",
        "tiny/code",
        "tiny/definitions",
        "tiny/chat",
        "tiny-10m-2l/prose",
        "tiny-10m-ngram/code",
        "tiny-3m-1l/definitions",
        "tiny/prose@1.0",
    )

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the knob `draft_length`, by default 5 tokens."""
        longest = cls.checked_options(**options).max_draft_length
        return (Knob("draft_length", 1, longest, min(5, longest), True, "tokens drafted a round, at most"),)

    @classmethod
    def trace_rule(cls, values: Mapping[str, Any], options: Any) -> TraceRule:
        """Return the exact test, for drafts of `draft_length` tokens."""
        return TraceRule(EXACT, 1.0, values["draft_length"])


class ThresholdTraits(DecoderTraits):
    """Facts about decoding with the `fallback` and `rollback` thresholds."""

    name = "threshold"
    env_name = "Thresholds"
    lossless = False
    lossless_at: ClassVar[Mapping[str, float]] = {"fallback": 0.0, "rollback": 1.0}
    stops_by_gain = True
    recorded_by = "trace"
    Options = ThresholdOptions
    workloads = (
        *(f"{pair}/{prompts}" for pair in ("tiny", "tiny-10m-2l", "tiny-10m-ngram", "tiny-3m-1l")
          for prompts in ("prose", "code", "definitions")),
        "tiny/prose@1.0",
    )  # fmt: skip

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the two thresholds; a rejection takes back a whole draft at most."""
        longest = cls.checked_options(**options).max_draft_length
        return (
            Knob(
                "fallback", 0.0, 1.0, 0.3,
                doc="largest distance at which a draft token is kept outright",
                step=0.2,
                preferred=(0.1, 0.4),
            ),
            Knob("rollback", 1.0, longest, 1.0, doc="draft tokens that a rejection takes back", preferred=(0.0, 0.2)),
        )  # fmt: skip

    @classmethod
    def trace_rule(cls, values: Mapping[str, Any], options: ThresholdOptions) -> TraceRule:
        """Return the thresholds, for drafts that end where the options say."""
        by_gain = options.stop == "expected-gain"
        return TraceRule(values["fallback"], values["rollback"], options.max_draft_length, by_gain)
