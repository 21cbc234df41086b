"""``python -m specgym.envs.profiles``: measure latency profiles into files; and which one an environment charges by.

Live decoding charges the latency measured on this machine. A replay needs no model, and should give the same figures
everywhere, so it charges the *reference profile* of its pair if one ships: measured once, on the machine that the file
names. For a machine of one's own give the environments ``profile=``: a file that this command wrote, what
`specgym.decoding.latency_measure.measured` returns, or a `specgym.decoding.roofline.roofline`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ..decoding.errors import SpecgymError
from ..decoding.latency import LatencyProfile
from ..decoding.latency_measure import arithmetic_of, measure, measured
from .workloads import Workload, workload

REFERENCES = Path(__file__).parent / "data" / "latency"
"""The folder of the profiles that ship with the package."""


def profile_of(found: Workload, given: LatencyProfile | str | Path | None, *, replayed: bool) -> LatencyProfile:
    """What the time of a workload is charged by.

    Args:
        found: the workload.
        given: a profile, or a file with one; None for the default.
        replayed: whether the default is the pair's reference profile, if one ships. Otherwise the pair is measured on
            this hardware, for which it is loaded; measured once, it is read from the cache.

    Raises:
        LatencyProfileError: the file is missing or damaged. Loading errors as for `load_pair`, where none is given.
    """
    if isinstance(given, str | Path):
        return LatencyProfile.load(given)
    if given is not None:
        return given
    reference = REFERENCES / profile_name(found)
    if replayed and isinstance(found.pair, str) and reference.is_file():
        return _loaded(reference)
    return measured(found.load(), sampling=found.sampling)


def profile_name(found: Workload) -> str:
    """The file name of a profile that serves a workload: its pair, and whether tokens are drawn."""
    pair = found.pair if isinstance(found.pair, str) else found.pair.name
    plain = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in pair)
    return f"{plain}.{arithmetic_of(found.sampling)}.json"


@functools.lru_cache(maxsize=64)
def _loaded(path: Path) -> LatencyProfile:
    return LatencyProfile.load(path)


@dataclass(frozen=True)
class ProfileCommand:
    """Measure how long drafting and verifying take on this machine, which should do nothing else meanwhile."""

    workloads: tyro.conf.Positional[tuple[str, ...]]
    """pair/prompts or pair/prompts@temperature. Prompts do not matter here: workloads of one pair that are all greedy
    share a profile."""
    out: Path = Path("latency")
    """Folder of the profiles."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences decoded together, at which to measure."""
    contexts: tuple[int, ...] = ()
    """Tokens read before, at which to measure; by default a short prompt's."""
    max_draft_length: int = 16
    """The longest draft timed, in tokens."""
    threads: int = 1
    """torch's threads; 0 for torch's own choice."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, given as on the command line. A profile that is there already is left alone."""
    command = tyro.cli(ProfileCommand, prog="python -m specgym.envs.profiles", description=__doc__, args=arguments)
    if command.threads:
        torch.set_num_threads(command.threads)
    for name in command.workloads:
        found = workload(name)
        path = command.out / profile_name(found)
        if path.is_file():
            print(f"{path} is there already")
            continue
        profile = measure(
            found.load(),
            max_draft_length=command.max_draft_length,
            sampling=found.sampling,
            batch_sizes=command.batch_sizes,
            contexts=command.contexts or None,
        )
        profile.save(path)
        print(
            f"{path}: {1000 * profile.autoregressive_seconds:.2f} ms/token plain, one more drafted token adds "
            f"{profile.marginal_cost():.2f} of that"
        )


if __name__ == "__main__":
    try:
        main()
    except SpecgymError as error:
        sys.exit(f"error: {error}")
