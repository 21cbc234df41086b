"""``python -m specgym.envs.record``: record workloads, so that decoding can be replayed without the models.

A *trace* has what the draft would do at every position of texts, and replays decoders that draft chains of tokens. Of a
pair with several drafts, ``target+draftA,draftB``, a *mixed trace* has what each of them would do along the same texts.
With ``--decoder NAME`` the *outcomes* of that decoder are recorded, over many settings of its knobs.

A recording that is interrupted goes on from the last complete text when the same command is given again. ``--jobs`` and
``--ray`` record several workloads at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

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

from .ray_cluster import WorkerError, cluster, on_ray
from .recordings.archive import TraceError, parts_of
from .recordings.mixed_recorder import record_mixed
from .recordings.outcome_recorder import OutcomeSettings, record_outcomes
from .recordings.outcomes import outcomes_name
from .recordings.own_texts import RecordSettings
from .recordings.trace import trace_name
from .recordings.trace_recorder import record
from .registration import register
from .workers import Task, run_tasks
from .workloads import workload

__all__ = ["RecordCommand", "RecordSettings", "main", "record"]

_OF_TRACES = ("draft_length", "prompts", "tokens", "detour_prompts", "detour_tokens", "seed")
_OF_OUTCOMES = ("settings", "refine", "draft_length", "prompts", "tokens", "seed")
_MOST_JOBS = 256


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
    (12). Not for several drafts, of which the target's own texts alone are recorded."""
    detour_tokens: int | None = None
    """Traces: tokens of each of those texts, at most (32)."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, at most; longer ones are cut, with a warning. Defaults to whole prompts, which leave 256
    tokens of the target's context, or half of a short one, for the text. What learns from the recording takes the same
    option."""
    seed: int | None = None
    """Seed of all sampling, and of the choice of the settings (0)."""
    jobs: int = 1
    """Workloads recorded at a time, each in a process of its own if there are several."""
    ray: tuple[str, ...] | None = None
    """Record on a Ray cluster, a workload a worker and GPU: without an address on this machine's cluster or a new one,
    else at that address (auto, host:port, ray://host:10001). Files come back to this machine. Give it last."""

    def __post_init__(self) -> None:
        threads = partial(whole_number, at_least=0, at_most=MOST_THREADS, error=TraceError)
        check_fields(self, threads, "threads")
        check_fields(self, partial(whole_number, at_most=_MOST_JOBS, error=TraceError), "jobs")
        if self.ray is not None and self.device not in (None, "cpu", "cuda"):
            raise WorkerError(f"--ray gives every worker a GPU of its own: leave out --device {self.device}")

    @property
    def folder(self) -> Path:
        """Folder of the files."""
        return self.out or Path("traces" if self.decoder is None else "outcomes")

    def files(self, name: str) -> list[str]:
        """Names of a workload's files, in the order of the splits."""
        if self.decoder is None:
            return [trace_name(name, split) for split in self.splits]
        return [outcomes_name(name, self.decoder, split) for split in self.splits]

    def amount(self) -> RecordSettings | OutcomeSettings:
        """Return what to record of a workload.

        Raises:
            TraceError: a number does not apply to this kind of recording, or is out of range.
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
        return RecordSettings(**numbers) if self.decoder is None else OutcomeSettings(self.decoder, **numbers)

    def check_drafts(self) -> None:
        """Raise TraceError where detours are asked for of a pair with several drafts; errors as for `workload`."""
        mixed = next((name for name in self.workloads if self.decoder is None and workload(name).mixed), None)
        for option in ("detour_prompts", "detour_tokens"):
            if mixed is not None and getattr(self, option):
                raise TraceError(
                    f"--{option.replace('_', '-')}: {mixed} has several drafts, which are recorded along the target's "
                    "own texts alone; leave it out"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, given as on the command line. A file that is there already is left alone."""
    import tyro

    command = tyro.cli(
        RecordCommand,
        prog="python -m specgym.envs.record",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    registered = _registered(command)
    registered.amount()
    registered.check_drafts()
    with on_ray(command.ray):
        if cluster() is None and min(command.jobs, len(command.workloads)) == 1:
            for name in command.workloads:
                for line in _record(registered, name, command.folder, progress=True):
                    print(line)
        else:
            _record_apart(registered, command.decoder)


def _registered(command: RecordCommand) -> RecordCommand:
    """Register a decoder that is given by its path, and name it."""
    by_path = command.decoder is not None and ":" in command.decoder
    return replace(command, decoder=register(command.decoder)) if by_path and command.decoder else command


def _record_apart(command: RecordCommand, decoder: str | None) -> None:
    """Record workloads in processes of their own, with the progress of all together.

    Args:
        command: whose decoder is registered here.
        decoder: the same as it was given, to be registered there, too.
    """
    tasks = []
    for name in dict.fromkeys(command.workloads):
        files = command.files(name)
        for path in [command.folder / file for file in files]:
            if path.is_file():
                print(f"{path} is there already")
        if all((command.folder / file).is_file() for file in files):
            continue
        beside = [] if command.decoder else [trace_name(name, "train")]  # whose chances a test split's trace takes
        known = dict.fromkeys([*beside, *files, *(parts_of(Path(file)).name for file in files)])
        run = partial(_recorded, replace(command, decoder=decoder), name)
        models = command.device != "cpu"
        tasks.append(Task(name, run, command.folder, tuple(known), models, max(1, command.threads)))
    with tqdm(desc="Recording", total=len(tasks), unit="workload") as bar:

        def watch() -> None:
            parts = (parts_of(command.folder / file) for task in tasks for file in command.files(task.name))
            bar.set_postfix_str(
                f"{sum(len(list(folder.glob('*-*.npz'))) for folder in parts)} texts of unfinished ones"
            )

        def done(number: int, lines: list[str]) -> None:
            bar.write("\n".join(lines))
            bar.update()

        run_tasks(tasks, command.jobs, done, watch)


def _recorded(command: RecordCommand, name: str, folder: Path) -> list[str]:
    """Record a workload in a process of its own."""
    return list(_record(_registered(command), name, folder, progress=False))


def _record(command: RecordCommand, name: str, folder: Path, progress: bool) -> Iterator[str]:
    """Record a workload's splits that are not in a folder yet; a line about every file."""
    import torch

    if command.threads:
        torch.set_num_threads(command.threads)
    settings = command.amount()
    with models_placed(command.dtype, command.device), prompts_limited(command.max_prompt_tokens):
        for split, file in zip(command.splits, command.files(name), strict=True):
            path = folder / file
            if path.is_file():
                if progress:
                    yield f"{path} is there already"
            elif isinstance(settings, RecordSettings) and workload(name).mixed:
                mixed = record_mixed(workload(name), split, path, settings, progress)
                pairs = zip(mixed.drafts, mixed.traces, strict=True)
                rates = ", ".join(f"{trace.match[:, 0].mean():.0%} {draft}" for draft, trace in pairs)
                count = f"{len(mixed.first.text)} positions of {mixed.prompts} prompts"
                yield f"{command.folder / file}: {count}, first tokens that match: {rates}"
            elif isinstance(settings, RecordSettings):
                trace = record(workload(name), split, path, settings, progress)
                rate = trace.match[: len(trace.text)].mean()
                count = f"{len(trace.text)} positions of {trace.prompts} prompts"
                yield f"{command.folder / file}: {count}, {rate:.0%} of the drafts match"
            else:
                recorded = record_outcomes(workload(name), split, path, settings, progress)
                count = f"{len(recorded.settings)} settings of {recorded.prompts} prompts"
                yield f"{command.folder / file}: {count}, {recorded.emitted.mean():.2f} tokens a round"


if __name__ == "__main__":
    sys.exit(run_command(main, "The same command goes on from the last complete text."))
