"""``python -m specgym.envs.profiles``: measure latency profiles into files; and which one an environment charges by.

Live decoding charges the latency measured on this machine. A replay needs no model, and should give the same figures
everywhere, so it charges the *reference profile* of its pair if one ships: measured once, on the machine that the file
names. For a machine of one's own give the environments ``profile=``: a file that this command wrote, what
`specgym.decoding.latency.measure.measured` returns, or a `specgym.decoding.latency.roofline.roofline`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from specgym.decoding import (
    CHAIN,
    Decoder,
    LatencyProfile,
    LatencyProfileError,
    SpecgymError,
    arithmetic_of,
    file_name,
    measure,
    measured,
    resolve,
    traits_of,
)

from .workloads import Workload, workload

REFERENCES = Path(__file__).parent / "data" / "latency"
"""The folder of the profiles that ship with the package."""


def profile_of(
    found: Workload,
    given: LatencyProfile | str | Path | None,
    *,
    replayed: bool,
    decoder: Decoder | str | None = None,
) -> LatencyProfile:
    """What the time of a workload is charged by.

    Args:
        found: the workload.
        given: a profile, or a file with one; None for the default.
        replayed: whether the default is the pair's reference profile, if one ships. Otherwise the pair is measured on
            this hardware, for which it is loaded; measured once, it is read from the cache.
        decoder: whose rounds are charged: a decoder, or the name of one, which is built with its default options where
            it has to be measured; None for chains.

    Raises:
        LatencyProfileError: the file is missing or damaged, or what is given was made for another kind of rounds.
        ValueError: the pair does not suit the decoder. Loading errors as for `load_pair`, where no profile is given.
    """
    if isinstance(given, str | Path):
        given = LatencyProfile.load(given)
    if given is not None:
        return given.require_kind(_kind(found, decoder))
    reference = REFERENCES / profile_name(found, decoder)
    if replayed and isinstance(found.pair, str) and reference.is_file():
        return _loaded(reference)
    return measured(found.load(), decoder, sampling=found.sampling)


def profile_name(found: Workload, decoder: Decoder | str | None = None) -> str:
    """The file name of a profile that serves a workload: what is timed, and whether tokens are drawn.

    Decoders that need a draft are timed with a pair, the others with its target alone, so for them `tiny` and
    `tiny-10m` share a profile.
    """
    if decoder is None or traits_of(decoder).needs_draft:
        subject = found.pair if isinstance(found.pair, str) else found.pair.name
    else:
        subject = resolve(found.pair).target if isinstance(found.pair, str) else found.pair.target.name
    kind = _kind(found, decoder)
    label = "" if kind == CHAIN else f"{kind}."
    return f"{file_name(subject)}.{label}{arithmetic_of(found.sampling)}.json"


def _kind(found: Workload, decoder: Decoder | str | None) -> str:
    return CHAIN if decoder is None else traits_of(decoder).cost_kind(found.sampling.greedy)


@functools.lru_cache(maxsize=64)
def _loaded(path: Path) -> LatencyProfile:
    return LatencyProfile.load(path)


@dataclass(frozen=True)
class ProfileCommand:
    """Measure how long decoding's rounds take on this machine, which should do nothing else meanwhile."""

    workloads: tyro.conf.Positional[tuple[str, ...]]
    """pair/prompts or pair/prompts@temperature. Prompts do not matter here: workloads of one pair that are all greedy
    share a profile, and for decoders that need no draft those of one target."""
    out: Path = Path("latency")
    """Folder of the profiles."""
    decoder: Annotated[str, tyro.conf.arg(aliases=["--rounds"])] = CHAIN
    """Decoder whose rounds are timed; by default drafting a chain of tokens and verifying it."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences decoded together, at which to measure; for all but chains 1 alone."""
    contexts: tuple[int, ...] = ()
    """Tokens read before, at which to measure; by default a short prompt's."""
    max_draft_length: int | None = None
    """Of chains, the longest draft timed, in tokens; by default 16."""
    max_target_tokens: int | None = None
    """Of all but chains, the most tokens that a timed pass reads; by default as many as the decoder's knobs allow, or
    as there is room for."""
    threads: int = 1
    """torch's threads; 0 for torch's own choice."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, given as on the command line. A profile that is there already is left alone."""
    command = tyro.cli(ProfileCommand, prog="python -m specgym.envs.profiles", description=__doc__, args=arguments)
    if command.threads:
        torch.set_num_threads(command.threads)
    decoder = None if command.decoder == CHAIN else command.decoder
    for name in command.workloads:
        found = workload(name)
        path = command.out / profile_name(found, decoder)
        if path.is_file():
            print(f"{path} is there already")
            continue
        pair = found.load()
        try:
            profile = measure(
                pair,
                decoder,
                max_draft_length=command.max_draft_length,
                max_target_tokens=command.max_target_tokens,
                sampling=found.sampling,
                batch_sizes=command.batch_sizes,
                contexts=command.contexts or None,
            )
        except ValueError as error:  # the arguments do not fit the pair or one another
            raise LatencyProfileError(f"{name} cannot be measured: {error}") from error
        profile.save(path)
        token = "drafted token" if profile.kind == CHAIN else "token read"
        print(
            f"{path}: {1000 * profile.autoregressive_seconds:.2f} ms/token plain, one more {token} adds "
            f"{profile.marginal_cost():.2f} of that"
        )


if __name__ == "__main__":
    try:
        main()
    except SpecgymError as error:
        sys.exit(f"error: {error}")
