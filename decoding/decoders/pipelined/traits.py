"""Facts about pipelined decoding that need no model. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Literal

from ...errors import check_fields, one_of, whole_number
from ...traits import EXACT, DecoderTraits, Knob, TraceRule
from ..traits import ThresholdTraits

Place = Literal["auto", "process", "thread"]
PIPELINED: Final = "pipelined"
"""Cost kind of rounds in which drafting goes on while the target verifies."""


@dataclass(frozen=True)
class PipelinedOptions:
    """Build options of pipelined decoding.

    Raises:
        ValueError: a number is out of range, or there is no such place.
    """

    max_draft_length: int = 16
    """Upper end of the `draft_length` knob, in tokens."""
    place: Place = "auto"
    """Place where the draft works: a `process`, forked, or a `thread`. `auto` forks on Linux, if the draft is on a CPU
    and this process may have children."""
    draft_threads: int = 1
    """Threads of torch that the target leaves to the draft, where both are on a CPU; a forked draft uses one."""
    pin: bool = False
    """Bind the draft to the last core that this process may use; on Linux."""

    def __post_init__(self) -> None:
        one_of("place", self.place, ("auto", "process", "thread"))
        check_fields(self, whole_number, "max_draft_length")
        check_fields(self, partial(whole_number, at_least=0), "draft_threads")


def _window(longest: int) -> tuple[Knob, ...]:
    usual = min(4, longest)
    return (
        Knob("draft_length", 0, longest, usual, True, "tokens drafted while the target verifies; 0 for none"),
        Knob("pre_verify", 0, 1, 1, True, "1: after a rejection the target reads on at once; 0: it awaits a draft"),
    )


class PipelinedTraits(DecoderTraits):
    """Facts about exact pipelined decoding."""

    name = "pipelined"
    env_name = "Pipeline"
    lossless = True
    recorded_by = "trace"
    overlaps = True
    Options = PipelinedOptions
    workloads = ("tiny/prose", "tiny/code", "tiny/definitions", "tiny/chat", "tiny-10m-2l/prose", "tiny/prose@1.0")

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the tokens drafted at a time, and whether the target waits for the first of them."""
        return _window(cls.checked_options(**options).max_draft_length)

    @classmethod
    def cost_kind(cls, greedy: bool) -> str:
        """Return the kind of all pipelined rounds."""
        return PIPELINED

    @classmethod
    def trace_rule(cls, values: Any, options: PipelinedOptions) -> TraceRule:
        """Return the exact test, with drafting that goes on meanwhile."""
        return TraceRule(EXACT, 1.0, values["draft_length"], pre_verify=values["pre_verify"])


class PipelinedThresholdTraits(DecoderTraits):
    """Facts about pipelined decoding with the `fallback` and `rollback` thresholds."""

    name = "pipelined-threshold"
    env_name = "PipelineThresholds"
    lossless = False
    lossless_at: ClassVar[Mapping[str, float]] = {"fallback": 0.0, "rollback": 1.0}
    overlaps = True
    Options = PipelinedOptions

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the two thresholds, and the knobs of the pipeline."""
        longest = cls.checked_options(**options).max_draft_length
        return (*ThresholdTraits.knobs_without_pair(max_draft_length=longest), *_window(longest))

    @classmethod
    def cost_kind(cls, greedy: bool) -> str:
        """Return the kind of all pipelined rounds."""
        return PIPELINED
