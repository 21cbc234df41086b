"""``python -m specgym.envs.record``: record workloads, so that decoding can be replayed without the models.

A *trace* has what the draft would do at every position of texts, and replays decoders that draft chains of tokens. With
``--decoder NAME`` the *outcomes* of that decoder are recorded, over many settings of its knobs.

A recording that is interrupted goes on from the last complete text when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from specgym.decoding import (
    MOST_THREADS,
    ModelType,
    Split,
    check_fields,
    models_placed,
    prompts_limited,
    run_command,
    traits_of,
    whole_number,
)

from .recordings.archive import TraceError
from .recordings.outcome_recorder import OutcomeSettings, record_outcomes
from .recordings.outcomes import outcomes_name
from .recordings.trace import trace_name
from .recordings.trace_recorder import RecordSettings, record
from .registration import register
from .workloads import workload

__all__ = ["RecordCommand", "RecordSettings", "main", "record"]

_OF_TRACES = ("draft_length", "prompts", "tokens", "detour_prompts", "detour_tokens", "seed")
_OF_OUTCOMES = ("settings", "refine", "draft_length", "prompts", "tokens", "seed")


@dataclass(frozen=True)
class RecordCommand:
    """Record what a pair's draft would do at every position of texts; or, with --decoder, what a decoder does with many
    settings of its knobs. Either can be replayed in NumPy, without the models."""

    workloads: tuple[str, ...]
    """pair/prompts or pair/prompts@temperature; several may be given."""
    decoder: str | None = None
    """Registered decoder whose outcomes are recorded, or the path of its class (package.module:Class); by default a
    trace of the draft is recorded, which is enough for decoders that draft chains."""
    out: Path | None = None
    """Folder of the files, each named after its workload and split; by default traces, or outcomes."""
    splits: tuple[Split, ...] = ("train", "test")
    """Splits of the prompts to record; every split has a file of its own."""
    threads: int = 0
    """torch's threads; 0 for torch's own choice."""
    dtype: ModelType | None = None
    """Type of the models' weights. Defaults to float32 on a CPU and bfloat16 elsewhere."""
    device: str | None = None
    """Device of the models: cpu, cuda, cuda:1, or auto for all cards. Defaults to CUDA if there is any."""
    settings: int | None = None
    """Outcomes: settings of the knobs, the default and the presets among them (48)."""
    refine: int | None = None
    """Outcomes: settings beyond those, where the recorded ones say that decoding is fastest (0)."""
    draft_length: int | None = None
    """Tokens drafted at every position, K (16); only for traces, and decoders that draft chains."""
    prompts: int | None = None
    """Prompts of the split, at most; the first ones (24, or 12 for outcomes)."""
    tokens: int | None = None
    """Tokens of the text after each prompt, at most (64)."""
    detour_prompts: int | None = None
    """Traces: prompts for which the texts that threshold decoding leads to are recorded too, at most; 0 for none
    (12)."""
    detour_tokens: int | None = None
    """Traces: tokens of each of those texts, at most (32)."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, at most; longer ones are cut, with a warning. Defaults to whole prompts, which leave 256
    tokens of the target's context, or half of a short one, for the text. What learns from the recording takes the same
    option."""
    seed: int | None = None
    """Seed of all sampling, and of the choice of the settings (0)."""

    def __post_init__(self) -> None:
        threads = partial(whole_number, at_least=0, at_most=MOST_THREADS, error=TraceError)
        check_fields(self, threads, "threads")

    @property
    def folder(self) -> Path:
        """Folder of the files."""
        return self.out or Path("traces" if self.decoder is None else "outcomes")

    def numbers(self) -> dict[str, int]:
        """Return the numbers that were set, by name, for `RecordSettings` or `OutcomeSettings`.

        Raises:
            TraceError: a number does not apply to this kind of recording.
        """
        names = dict.fromkeys((*_OF_TRACES, *_OF_OUTCOMES))
        numbers = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name in numbers:
            option = f"--{name.replace('_', '-')}"
            if self.decoder is None and name not in _OF_TRACES:
                raise TraceError(f"{option} is for outcomes; give --decoder, or leave it out to record a trace")
            if self.decoder is not None and name not in _OF_OUTCOMES:
                raise TraceError(f"{option} is for traces; leave it out, or leave out --decoder {self.decoder}")
            if name == "draft_length" and self.decoder and not traits_of(self.decoder).drafts_chains():
                raise TraceError(f"{option}: {self.decoder} drafts no tokens one after another; leave it out")
        return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, given as on the command line. A file that is there already is left alone."""
    import torch
    import tyro

    command = tyro.cli(
        RecordCommand,
        prog="python -m specgym.envs.record",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    if command.threads:
        torch.set_num_threads(command.threads)
    if command.decoder is not None and ":" in command.decoder:
        command = replace(command, decoder=register(command.decoder))
    traces = outcomes = None
    if command.decoder is None:
        traces = RecordSettings(**command.numbers())
    else:
        outcomes = OutcomeSettings(command.decoder, **command.numbers())
    with models_placed(command.dtype, command.device), prompts_limited(command.max_prompt_tokens):
        _record_all(command, traces, outcomes)


def _record_all(command: RecordCommand, traces: RecordSettings | None, outcomes: OutcomeSettings | None) -> None:
    for name in command.workloads:
        for split in command.splits:
            file = trace_name(name, split) if outcomes is None else outcomes_name(name, outcomes.decoder, split)
            path = command.folder / file
            if path.is_file():
                print(f"{path} is there already")
            elif outcomes is None:
                trace = record(workload(name), split, path, traces, progress=True)
                rate = trace.match[: len(trace.text)].mean()
                print(f"{path}: {len(trace.text)} positions of {trace.prompts} prompts, {rate:.0%} of the drafts match")
            else:
                recorded = record_outcomes(workload(name), split, path, outcomes, progress=True)
                length = recorded.emitted.mean()
                print(
                    f"{path}: {len(recorded.settings)} settings of {recorded.prompts} prompts, {length:.2f} tokens a "
                    "round"
                )


if __name__ == "__main__":
    sys.exit(run_command(main, "The same command goes on from the last complete text."))
