"""Learned knobs against every setting of a dense grid, decoded live on held-out prompts.

    python train.py --env specgym/Lookahead-v0 --name lookahead
    python -m benchmarks.learned_against_grid runs/lookahead
    python -m benchmarks.learned_against_grid runs/lookahead --window 1 2 3 4 6 8 12 16 --ngram 2 3 4 --guesses 0 4 8

Any run of train.py that tunes a decoder will do. Every knob of it is an option that takes the values to try; by default
they lie evenly over the knob's range, so many that the grid has about 250 settings. Time is charged by the latency
profiles that the run has stored, and what it brings is weighed by the run's reward. The whole grid is decoded with a
few held-out prompts, and the best of it, the finalists, with many more, on which the best is chosen. It is chosen on
the very prompts that it is judged on, which no tuner could know, so it is a bound and not a rival. A rival that learns
nothing is the recorded setting that was fastest with the training prompts, where a run was replayed by outcomes.
Finished workloads are kept in ``learned_against_grid-<digest>.json`` in the run's folder, for the next call with the
same options.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks.knob_grids import Setting, best_apart, settings_of, thinned
from specgym.agents import (
    ExportedPolicy,
    KnobSettings,
    RunFolder,
    SettingsError,
    load_knobs,
    load_settings,
    quieten,
    read_json,
    recording_path,
    reward_of,
    this_command,
    whole_numbers,
)
from specgym.decoding import LatencyProfile, SpecgymError, digest, write_json
from specgym.envs import Outcomes, decode_prompts, find_recording, summarise, totals, workload

FORMAT = "specgym-learned-against-grid-3"
FILE = "learned_against_grid-{}.json"
AIM = 0.97
_CHUNK = 4  # settings that a process decodes before it says so


@dataclass
class Settings:
    """Decode held-out prompts with every setting of a grid, and compare the best with what a run has learned."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of train.py."""
    workloads: tuple[str, ...] = ()
    """Workloads of the run; by default all."""
    prompts: int = 6
    """Held-out prompts of each workload for the whole grid, at most."""
    finalists: int = 16
    """Best settings of the grid that are decoded with more prompts; settings that did the very same count once."""
    final_prompts: int = 24
    """Held-out prompts of each workload for these, for what was learned, and for the default, at most."""
    tokens: int = 64
    """Tokens generated for each."""
    jobs: int = 1
    """Processes that decode side by side, with one thread each. Clocks are not read, so they may share the machine."""


def rewards(run: Path, name: str, chosen: Sequence[Setting], prompts: int, tokens: int) -> list[float]:
    """Rewards of some settings on a workload's held-out prompts, decoded live.

    Greedy decoding gives the same text every time, so once is enough; sampled texts are drawn with each of the seeds
    of the run's evaluation, the same ones for all settings.
    """
    torch.set_num_threads(1)
    folder = RunFolder(run)
    settings = load_settings(folder.settings)
    profile = LatencyProfile.load(folder.profile_paths(settings.workloads)[settings.workloads.index(name)])
    task = workload(name)
    decoder = settings.build(task.load())
    held_out = task.prompt_ids("test")[:prompts]
    earned = []
    for knobs in chosen:
        texts = [
            text
            for seed in (settings.evaluation.seeds[:1] if task.sampling.greedy else settings.evaluation.seeds)
            for place, prompt in enumerate(held_out)
            for text in decode_prompts(decoder, knobs, [prompt], tokens, task.sampling, 10_000 * seed + place)
        ]
        earned.append(reward_of(settings.reward, summarise(decoder, texts, profile), decoder, knobs))
    return earned


def fastest_recorded(settings: KnobSettings, name: str, profile: LatencyProfile) -> Setting | None:
    """The recorded setting that is fastest with a workload's training prompts; None if the run has no outcomes."""
    if not settings.replayed:
        return None
    outcomes, _ = find_recording(settings.decoder, recording_path(settings, name, "train"), name, "train")
    if not isinstance(outcomes, Outcomes):
        return None
    seconds = totals(outcomes, profile.at(), settings.environment.max_new_tokens).per_token("seconds")
    values = outcomes.settings[int(np.argmin(seconds))].tolist()
    return dict(zip((knob.name for knob in outcomes.info.knobs), values, strict=True))


def compared(
    grid: Sequence[Setting],
    earned: Sequence[float],
    finalists: Sequence[Setting],
    finals: Sequence[float],
    others: Mapping[str, Setting],
) -> dict[str, Any]:
    """A workload's entry in the file.

    Args:
        grid: its settings.
        earned: the reward of each of them with few prompts.
        finalists: those that were decoded with many.
        finals: the reward of each of these, then of each of the others, with many.
        others: the learned setting and those that it is compared with, by name.
    """
    of_finalists, of_others = finals[: len(finalists)], finals[len(finalists) :]
    best = int(np.argmax(of_finalists))

    def entries(settings: Iterable[Setting], rewards: Sequence[float]) -> list[dict[str, Any]]:
        return [{"knobs": knobs, "reward": reward} for knobs, reward in zip(settings, rewards, strict=True)]

    return {
        "best": {"knobs": finalists[best], "reward": of_finalists[best]},
        **dict(zip(others, entries(others.values(), of_others), strict=True)),
        "finalists": entries(finalists, of_finalists),
        "grid": entries(grid, earned),
    }


def decoded(
    chosen: Settings, name: str, settings: Sequence[Setting], prompts: int, tick: Callable[[int], None]
) -> list[float]:
    """`rewards` of many settings, in `chosen.jobs` processes; `tick` is called with how many more are done."""
    chunks = {place: settings[place : place + _CHUNK] for place in range(0, len(settings), _CHUNK)}
    arguments = prompts, chosen.tokens
    done: dict[int, list[float]] = {}
    if chosen.jobs == 1:
        for place, chunk in chunks.items():
            done[place] = rewards(chosen.run, name, chunk, *arguments)
            tick(len(chunk))
    else:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(chosen.jobs, context) as pool:
            asked = {
                pool.submit(rewards, chosen.run, name, chunk, *arguments): place for place, chunk in chunks.items()
            }
            for finished in as_completed(asked):
                done[asked[finished]] = finished.result()
                tick(len(chunks[asked[finished]]))
    return [reward for place in chunks for reward in done[place]]


def parsed(arguments: Sequence[str] | None) -> tuple[Settings, KnobSettings, dict[str, list[float]]]:
    """The options, the run's settings, and the values of its knobs to try.

    Raises:
        SettingsError: a knob's value is out of its range, or a workload is not the run's.
    """
    chosen, rest = tyro.cli(
        Settings,
        prog="python -m benchmarks.learned_against_grid",
        description=__doc__,
        args=arguments,
        return_unknown_args=True,
    )
    settings = load_settings(RunFolder.existing(chosen.run).settings)
    for name in chosen.workloads:
        if name not in settings.workloads:
            raise SettingsError(f"{chosen.run} has not tuned {name!r}; it has tuned: {', '.join(settings.workloads)}")
    if min(chosen.prompts, chosen.final_prompts, chosen.finalists, chosen.tokens, chosen.jobs) < 1:
        raise SettingsError("--prompts, --final-prompts, --finalists, --tokens and --jobs must be at least 1")
    knobs = ExportedPolicy.load(RunFolder(chosen.run).first_policy).knobs
    options: Any = dataclasses.make_dataclass(
        "Values", [(knob.name, tuple[float, ...], dataclasses.field(default=())) for knob in knobs]
    )
    passed = {name: values for name, values in vars(tyro.cli(options, args=rest)).items() if values}
    for knob in knobs:
        for value in passed.get(knob.name, ()):
            if not knob.low <= value <= knob.high or (knob.integer and value != int(value)):
                kind = "whole numbers" if knob.integer else "numbers"
                raise SettingsError(f"--{knob.name} takes {kind} from {knob.low:g} to {knob.high:g}, got {value:g}")
    return chosen, settings, thinned(knobs, passed)


def finished_before(path: Path, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The workloads in the file of an earlier call, if that was asked for the same."""
    if not path.is_file():
        return {}
    stored = read_json(path, "remove it")
    same = stored.get("format") == FORMAT and stored.get("protocol") == protocol
    return dict(stored["workloads"]) if same else {}


def compare(
    chosen: Settings, settings: KnobSettings, values: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Any], Path]:
    """Decode workload after workload, and store each as soon as it is finished.

    Returns:
        All that were asked for, by name, and the file, whose name tells one protocol from another.
    """
    run = RunFolder(chosen.run)
    stored_knobs, grid = load_knobs(run.knobs), settings_of(values)
    # Where the advice is not to speculate, the place where the first policy stays is compared.
    recommended = {name: knobs or stored_knobs["rests"][name][0] for name, knobs in stored_knobs["workloads"].items()}
    protocol = {
        "prompts": chosen.prompts,
        "finalists": chosen.finalists,
        "final_prompts": chosen.final_prompts,
        "tokens": chosen.tokens,
        "values": {name: list(tried) for name, tried in values.items()},
        "learned": recommended,
        "seeds": list(settings.evaluation.seeds),
        "profiles": digest(path.read_text(encoding="utf-8") for path in run.profile_paths(settings.workloads)),
    }
    stored = run.path / FILE.format(digest([json.dumps(protocol, sort_keys=True)])[:8])
    done = finished_before(stored, protocol)
    names = chosen.workloads or settings.workloads
    with Progress(console=Console(stderr=True)) as progress:
        for name in names:
            if name in done:
                progress.add_task(name, total=1, completed=1)
                continue
            profile = LatencyProfile.load(run.profile_paths(settings.workloads)[settings.workloads.index(name)])
            decoder = settings.build(workload(name).load())
            others = {"learned": decoder.resolve_knobs(recommended[name]), "default": decoder.resolve_knobs(None)}
            recorded = fastest_recorded(settings, name, profile)
            if recorded is not None:
                others["recorded"] = recorded
            task = progress.add_task(name, total=len(grid) + chosen.finalists + len(others))

            def tick(more: int, task: TaskID = task) -> None:
                progress.advance(task, more)

            earned = decoded(chosen, name, grid, chosen.prompts, tick)
            finalists = [grid[place] for place in best_apart(earned, chosen.finalists)]
            progress.update(task, total=len(grid) + len(finalists) + len(others))
            finals = decoded(chosen, name, [*finalists, *others.values()], chosen.final_prompts, tick)
            shown = {method: whole_numbers(decoder.knobs, knobs) for method, knobs in others.items()}
            done[name] = compared(grid, earned, finalists, finals, shown)
            content = {"format": FORMAT, "command": this_command(), "protocol": protocol, "workloads": done}
            write_json(stored, content)
    return {name: done[name] for name in names}, stored


def rendered(workloads: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """A line a workload, and one for all: what is best, and what the others reach of it."""
    rivals = {"learned": "learned", "recorded": "fastest recorded", "default": "default"}
    rivals = {name: heading for name, heading in rivals.items() if all(name in entry for entry in workloads.values())}
    table = Table(title=title, title_justify="left")
    table.add_column("workload")
    knobs = ", ".join(next(iter(workloads.values()))["default"]["knobs"])
    for heading in (f"best of the grid\n{knobs}", *rivals.values()):
        table.add_column(heading, justify="right")
        table.add_column("reward", justify="right")
        if "best" not in heading:
            table.add_column("share", justify="right")
    shares: dict[str, list[float]] = {name: [] for name in rivals}
    for workload_name, entry in workloads.items():
        cells = []
        for method in ("best", *rivals):
            cells += [", ".join(f"{value:.4g}" for value in entry[method]["knobs"].values())]
            cells += [f"{entry[method]['reward']:.3f}"]
            if method in rivals:
                shares[method].append(entry[method]["reward"] / entry["best"]["reward"])
                cells += [f"{shares[method][-1]:.3f}"]
        table.add_row(workload_name, *cells)
    table.add_section()
    means = (cell for values in shares.values() for cell in ("", "", f"{np.mean(values):.3f}"))
    table.add_row("mean", "", "", *means)
    reached = sum(share >= AIM for share in shares["learned"])
    table.caption = f"At least {AIM:g} of the grid's best learned on {reached} of {len(workloads)} workloads."
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode, store, and print a table. Returns the exit code: 0, or 2 for what the user can mend."""
    quieten()
    try:
        chosen, settings, values = parsed(arguments)
        workloads, stored = compare(chosen, settings, values)
    except SpecgymError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = int(np.prod([len(tried) for tried in values.values()]))
    title = (
        f"{chosen.run}: {size} settings with {chosen.prompts} held-out prompts, the best {chosen.finalists} with "
        f"{chosen.final_prompts}, {chosen.tokens} tokens each, live"
    )
    Console(width=160).print(rendered(workloads, title))
    print(f"Everything is in {stored}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
