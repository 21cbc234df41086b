"""Where an environment's decoding comes from: the models, live, or a recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.text import Text

from specgym.decoding import (
    Decoder,
    Knob,
    LatencyProfile,
    Pair,
    Round,
    Split,
    build_decoder,
    require_positive,
    traits_of,
)

from ..profiles import profile_of
from ..recordings.archive import TraceError
from ..recordings.outcomes import OutcomeError, Outcomes
from ..recordings.shipped_outcomes import Recording, find_recording, outcome_command, traced_decoders
from ..recordings.shipped_traces import record_command
from ..recordings.trace import Trace
from ..tuning.render import render_step
from ..workloads import Workload, default_workload
from ..workloads import workload as named_workload
from .metrics import decode_prompts, metrics, summarise
from .outcome_replay import OutcomeReplay
from .replay_table import ReplayTable
from .replaying import KnobReplay, TraceReplay
from .trace_replay import Replay


class Source(Protocol):
    """Decodes a workload's prompts with given knobs."""

    workload: Workload
    knobs: tuple[Knob, ...]
    profile: LatencyProfile
    prompts: Sequence[Any]
    """What `decode` takes as a prompt."""

    def chosen(self, prompt: object) -> Any:
        """A prompt that a user chose, as `decode` takes it.

        Raises:
            ValueError: it cannot be used; the message says why.
        """
        ...

    def decode(
        self, values: Mapping[str, float], prompts: Sequence[Any], random: np.random.Generator
    ) -> dict[str, float]:
        """Decode one or more prompts with these knobs, and return what `measuring.metrics` gives of all together."""
        ...

    def render(self, knobs: Mapping[str, float], shown: Mapping[str, float], marks: bool) -> Text:
        """What was decoded last, with knobs and metrics; `marks` as for `render_step`."""
        ...

    def forget(self) -> None:
        """Show nothing of what was decoded before."""
        ...

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Raise an error, with the way out, if knobs between these values cannot be decoded; (low, high) by name."""
        ...


class LiveSource:
    """Runs the models.

    Args:
        decoder: a name or a callable, as `build_decoder` takes it.
        workload: whose pair and prompts.
        tokens: generated of each prompt, at most.
        draft_length: K, for a decoder given by name.
        profile: as `profile_of` takes it.
        batch_size: of the operating point.
        context: of the operating point.
        wall: charge the clock instead of the profile.
    """

    def __init__(
        self,
        decoder: str | Callable[[Pair], Decoder],
        workload: str | Workload | None,
        split: Split | None,
        tokens: int,
        draft_length: int,
        profile: LatencyProfile | str | Path | None,
        batch_size: int,
        context: int | None,
        wall: bool,
    ) -> None:
        found = named_workload(workload or default_workload(decoder))
        self.workload = found if split is None else found.with_split(split)
        options = traits_of(decoder).accepted_options(max_draft_length=draft_length) if isinstance(decoder, str) else {}
        self.decoder = build_decoder(decoder, self.workload.load(), **options)
        self.knobs = self.decoder.knobs
        profile = profile_of(self.workload, profile, replayed=False, decoder=self.decoder)
        self.profile = profile.at(batch_size=batch_size, context=context)
        self.prompts: Sequence[Sequence[int]] = self.workload.prompt_ids()
        self._tokens = tokens
        self._wall = wall
        self._last: tuple[Sequence[int], list[Round]] = (), []

    def chosen(self, prompt: Any) -> Sequence[int]:
        """The prompt of an index, or the token ids themselves, or of a string."""
        if isinstance(prompt, int | np.integer):
            if not 0 <= prompt < len(self.prompts):
                raise ValueError(
                    f"reset option prompt={prompt}: {self.workload} has {self.workload.split} prompts 0 to "
                    f"{len(self.prompts) - 1}"
                )
            return self.prompts[int(prompt)]
        try:
            return tuple(self.decoder.check_prompt(prompt))
        except (TypeError, ValueError) as error:
            raise ValueError(f"reset option prompt (an index, token ids or a string): {error}") from error

    def decode(
        self, values: Mapping[str, float], prompts: Sequence[Sequence[int]], random: np.random.Generator
    ) -> dict[str, float]:
        """Decode prompts given as token ids."""
        seed = int(random.integers(2**31))
        texts = decode_prompts(self.decoder, values, prompts, self._tokens, self.workload.sampling, seed)
        self._last = prompts[-1], texts[-1].rounds
        found = summarise(self.decoder, texts, self.profile)
        if self._wall:  # plain decoding is not run beside, its time stays the profile's
            found["ms_per_token"], found["seconds"] = found["wall_ms_per_token"], found["wall_seconds"]
            found["speedup"] = 1000 * self.profile.autoregressive_seconds / found["wall_ms_per_token"]
        return found

    def render(self, knobs: Mapping[str, float], shown: Mapping[str, float], marks: bool) -> Text:
        """The text in colours, knobs and metrics; the last text of several."""
        prompt, rounds = self._last
        title = self.workload.name
        return render_step(self.decoder.pair, prompt, rounds, title=title, knobs=knobs, metrics=shown, marks=marks)

    def forget(self) -> None:
        """Forget the last text."""
        self._last = (), []

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """The decoder takes whatever its knobs allow."""


class ReplaySource:
    """Looks up a recording. No model is loaded, unless the profile has to be measured.

    Args:
        decoder: a name.
        workload: as `find_recording` takes it, like the next two.
        split: whose prompts.
        recording: what was recorded, or its file; None for the one that ships.
        tokens: as for `LiveSource`, like the rest.
        draft_length: K.
        profile: what time is charged by.
        batch_size: of the operating point.
        context: of the operating point.
    """

    def __init__(
        self,
        decoder: str | Callable[[Pair], Decoder],
        workload: str | Workload | None,
        split: Split | None,
        recording: Recording | str | Path | None,
        tokens: int,
        draft_length: int,
        profile: LatencyProfile | str | Path | None,
        batch_size: int,
        context: int | None,
    ) -> None:
        found, self.workload = find_recording(decoder, recording, workload, split)
        assert isinstance(decoder, str)  # or no recording was found
        profile = profile_of(self.workload, profile, replayed=True, decoder=decoder)
        self.profile = profile.at(batch_size=batch_size, context=context)
        self.knobs, self._replay = replay_of(decoder, [found], [self.profile], tokens, draft_length)
        self.prompts: Sequence[int] = self._replay.prompts[0].tolist()
        self._decoded = False

    def chosen(self, prompt: Any) -> int:
        """The index of a recorded prompt."""
        return check_prompt(prompt, self.prompts, self.workload)

    def decode(
        self, values: Mapping[str, float], prompts: Sequence[int], random: np.random.Generator
    ) -> dict[str, float]:
        """Decode recorded prompts, given by their indices."""
        self._decoded = True
        if len(prompts) == 1:
            sums = self._replay.decode(prompts[0], values, random)
        else:  # in one go, which draws in the order in which the vector environment does
            texts = len(prompts)
            alike = {name: np.full(texts, value) for name, value in values.items()}
            which = np.asarray(prompts, np.int64), np.zeros(texts, np.int64)
            many = self._replay.decode_many(*which, alike, random)
            sums = {name: float(each.sum()) for name, each in many.items()}
        return metrics(**sums, autoregressive_seconds=self.profile.autoregressive_seconds)

    def render(self, knobs: Mapping[str, float], shown: Mapping[str, float], marks: bool) -> Text:
        """Knobs and metrics; a recording does not hold the tokens of every text, so none is shown."""
        text = Text()
        text.append(f"{self.workload.name}  ", style="bold").append("replayed  ", style="dim")
        for values in (knobs, shown if self._decoded else {}):
            text.append("  ".join(f"{name}={value:.4g}" for name, value in values.items()) + "\n")
        return text if self._decoded else text.append("nothing decoded yet")

    def forget(self) -> None:
        """Nothing was decoded."""
        self._decoded = False

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """What was recorded covers them, or an error says how to record more."""
        self._replay.check_ranges(ranges)


def replay_of(
    decoder: str | Callable[[Pair], Decoder],
    recordings: Sequence[Recording],
    profiles: Sequence[LatencyProfile],
    tokens: int,
    draft_length: int,
) -> tuple[tuple[Knob, ...], KnobReplay]:
    """The knobs of a decoder, and what replays it.

    Args:
        decoder: a name, as `find_recording` has accepted it.
        recordings: traces, or outcomes; one a workload.
        profiles: what each workload's time is charged by, at the operating point.
        tokens: generated of each prompt, at most.
        draft_length: K.

    Raises:
        TraceError: a recording has shorter texts or other drafts than asked for, or some are traces and some outcomes.
        ValueError: the decoder cannot be replayed.
    """
    traces = [one for one in recordings if isinstance(one, Trace)]
    outcomes = [one for one in recordings if isinstance(one, Outcomes)]
    if not outcomes:
        knobs, table = prepared(traces, decoder, tokens, draft_length)
        seconds = np.array([each.round_seconds(table.draft_length) for each in profiles])
        return knobs, TraceReplay(Replay(table, seconds, tokens), draft_length)
    if traces:
        names = f"a trace of {traces[0].info.workload}, and {outcomes[0].info}"
        raise OutcomeError(f"recording: got {names}; workloads that are replayed together need the same of either")
    assert isinstance(decoder, str)
    require_positive("draft_length", draft_length)
    for info in (one.info for one in outcomes):
        # All decoders but exact ones decide otherwise about the beginning of a draft that is longer.
        if info.draft_length and not traits_of(decoder).lossless and draft_length != info.draft_length:
            raise OutcomeError(
                f"draft_length is {draft_length}, and {info} are of {info.draft_length}; give draft_length="
                f"{info.draft_length}, or record others: {outcome_command(info.workload, decoder)} with --draft-length "
                f"{draft_length}"
            )
    replay = OutcomeReplay(outcomes, profiles, tokens)
    highest = {knob.name: knob.high for knob in outcomes[0].info.knobs}
    traits = traits_of(decoder)
    return traits.recorded_knobs(highest, **traits.accepted_options(max_draft_length=draft_length)), replay


def prepared(
    traces: Sequence[Trace], decoder: str | Callable[[Pair], Decoder], tokens: int, draft_length: int
) -> tuple[tuple[Knob, ...], ReplayTable]:
    """The knobs of a decoder, and the table of traces that replays it.

    Args:
        traces: one or several.
        decoder: `"threshold"` or `"speculative"`.
        tokens: generated of each prompt, at most.
        draft_length: K.

    Raises:
        TraceError: a trace has shorter texts or other drafts than asked for.
        ValueError: the decoder cannot be replayed.
    """
    traced = traced_decoders()
    if callable(decoder) or decoder not in traced:
        raise ValueError(f"a trace replays the decoders {', '.join(traced)} by name, not {decoder!r}")
    require_positive("draft_length", draft_length)
    traits = traits_of(decoder)
    for trace in traces:
        _check(trace, not traits.lossless, tokens, draft_length)
    return traits.knobs_without_pair(max_draft_length=draft_length), ReplayTable(traces, detours=not traits.lossless)


def check_prompt(prompt: Any, known: Sequence[int], workload: Workload) -> int:
    """The index of a prompt, if the recording can replay it.

    Raises:
        ValueError: it is no index, or not one of those.
    """
    if not isinstance(prompt, int | np.integer):
        raise ValueError(
            f"reset option prompt: a recording knows its own prompts only, so backend='replay' takes an index, not a "
            f"{type(prompt).__name__}; decode others with backend='live'"
        )
    if prompt not in known:
        raise ValueError(
            f"reset option prompt={prompt}: the recording of {workload} can replay the {workload.split} prompts "
            f"{', '.join(map(str, known))}"
        )
    return int(prompt)


def _check(trace: Trace, thresholds: bool, tokens: int, draft_length: int) -> None:
    info = trace.info
    name, again = f"the trace of {info.workload} ({info.split})", record_command(info.workload)
    detours = thresholds and len(trace.detour_prompts) > 0
    recorded = info.detour_tokens if detours else info.tokens
    if tokens > recorded:
        option = "--detour-tokens" if detours else "--tokens"
        raise TraceError(
            f"tokens_per_step is {tokens}, and {name} has texts of {recorded} tokens; ask for fewer, or record longer "
            f"ones: {again} with {option} {tokens}"
        )
    # With thresholds, what follows the draft's end decides about its beginning, so shorter drafts are other drafts.
    if draft_length > info.draft_length or (thresholds and draft_length != info.draft_length):
        raise TraceError(
            f"draft_length is {draft_length}, and {name} has drafts of {info.draft_length} tokens; give draft_length="
            f"{info.draft_length}, or record others: {again} with --draft-length {draft_length}"
        )
