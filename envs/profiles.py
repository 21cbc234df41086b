"""``python -m specgym.envs.profiles``: measure latency profiles into files. Also: which one an environment charges by.

Live decoding charges the latency measured on this machine. A replay needs no model, and should give the same figures
everywhere, so it charges the *reference profile* of its pair if one ships: measured once, on the machine that the file
names. For a machine of one's own give the environments ``profile=``: a file that this command wrote, what
`specgym.decoding.measured` returns, or a `specgym.decoding.roofline`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specgym.decoding import (
    CHAIN,
    MOST_THREADS,
    DecoderTraits,
    LatencyProfile,
    LatencyProfileError,
    ModelType,
    arithmetic_of,
    decoder_names,
    file_name,
    models_placed,
    resolve,
    run_command,
    traits_of,
    whole_number,
)

from .workloads import Workload, workload

if TYPE_CHECKING:
    from specgym.decoding import Decoder

REFERENCES = Path(__file__).parent / "data" / "latency"
"""Folder of the profiles that ship with the package."""
Profiles = (
    LatencyProfile
    | str
    | Path
    | Sequence[LatencyProfile | str | Path]
    | Mapping[str, LatencyProfile | str | Path]
    | None
)
"""Profile for all workloads, one for each in order, or a mapping from their names."""


def profile_of(
    named: Workload,
    profile: LatencyProfile | str | Path | None,
    *,
    replayed: bool,
    decoder: str | Decoder[Any] | None = None,
) -> LatencyProfile:
    """Return the profile by which a workload's time is charged.

    Args:
        named: the workload.
        profile: a profile, or a file with one; None for the default.
        replayed: whether the default is the pair's reference profile, if one ships. Otherwise the pair is measured on
            this hardware, for which it is loaded; measured once, it is read from the cache. A replay finds in its
            trace how often drafted tokens are kept; for decoders that ask for it, live decoding gets it here.
        decoder: whose rounds are charged: a registered name, or a decoder at work; by default chains of the draft.

    Raises:
        LatencyProfileError: the file is missing or damaged, or the profile was made for another kind of rounds.
        ValueError: the pair does not suit the decoder. Loading errors as for `load_pair`, where no profile is given.
    """
    kind = _kind(decoder, named)
    if isinstance(profile, str | Path):
        profile = LatencyProfile.load(profile)
    if profile is not None:
        profile = profile.require_kind(kind)
    elif replayed and isinstance(named.pair, str) and (file := REFERENCES / profile_name(named, decoder)).is_file():
        profile = _loaded(file)
    else:
        from specgym.decoding import measured  # which imports torch; a replay needs none

        profile = measured(named.load(), decoder, sampling=named.sampling)
    if replayed or profile.chances is not None or decoder is None or not traits_of(decoder).stops_by_gain:
        return profile
    from .recordings.trace_recorder import chances_for  # which imports torch, too

    return replace(profile, chances=chances_for(named))


def profile_name(named: Workload, decoder: str | DecoderTraits | None = None) -> str:
    """Return the file name of a profile that serves a workload: by what is timed, and whether tokens are drawn.

    Rounds of decoders without a draft are timed of the target alone, so pairs of one target share a profile.
    """
    kind = _kind(decoder, named)
    if decoder is None or traits_of(decoder).needs_draft:
        subject = named.pair if isinstance(named.pair, str) else named.pair.name
    else:
        subject = resolve(named.pair).target if isinstance(named.pair, str) else named.pair.target.name
    infix = "" if kind == CHAIN else f"{kind}."
    return f"{file_name(subject)}.{infix}{arithmetic_of(named.sampling)}.json"


def _kind(decoder: str | DecoderTraits | None, named: Workload) -> str:
    return CHAIN if decoder is None else traits_of(decoder).cost_kind(named.sampling.greedy)


@functools.lru_cache(maxsize=64)
def _loaded(path: Path) -> LatencyProfile:
    return LatencyProfile.load(path)


@dataclass(frozen=True)
class ProfileCommand:
    """Measure how long decoding's rounds take on this machine, which should do nothing else meanwhile."""

    workloads: tuple[str, ...]
    """pair/prompts or pair/prompts@temperature. Prompts do not matter here: workloads of one pair that are all greedy
    share a profile, and for a decoder without a draft those of one target."""
    out: Path = Path("latency")
    """Folder of the profiles."""
    decoder: str = CHAIN
    """Registered decoder whose rounds are timed, or `chain` for those of every decoder that drafts chains of tokens."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences decoded together, at which to measure; for all but chains 1 alone."""
    contexts: tuple[int, ...] = ()
    """Tokens read before, at which to measure; by default a short prompt's."""
    max_draft_length: int | None = None
    """Chains: longest draft timed, in tokens; by default 16."""
    max_target_tokens: int | None = None
    """All but chains: most tokens that a timed pass reads; by default the decoder's own limit, or as many as there is
    room for."""
    threads: int = 1
    """torch's threads; 0 for torch's own choice."""
    dtype: ModelType | None = None
    """Type of the models' weights. Defaults to float32 on a CPU and bfloat16 elsewhere."""
    device: str | None = None
    """Device of the models: cpu, cuda, cuda:1, or auto for all cards. Defaults to CUDA if there is any."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, given as on the command line. A profile that is there already is left alone."""
    import torch
    import tyro  # like torch: whoever replays needs none

    command = tyro.cli(
        ProfileCommand,
        prog="python -m specgym.envs.profiles",
        description=__doc__,
        args=_present(sys.argv[1:] if arguments is None else arguments),
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    decoder = None if command.decoder == CHAIN else command.decoder
    if decoder is not None and decoder not in decoder_names():
        raise LatencyProfileError(f"no decoder {decoder!r}; there are: {CHAIN}, {', '.join(decoder_names())}")
    if threads := whole_number("threads", command.threads, at_least=0, at_most=MOST_THREADS):
        torch.set_num_threads(threads)
    with models_placed(command.dtype, command.device):
        _measure_all(command, decoder)


def _measure_all(command: ProfileCommand, decoder: str | None) -> None:
    from specgym.decoding import measure

    for name in command.workloads:
        named = workload(name)
        path = command.out / profile_name(named, decoder)
        if path.is_file():
            _require_type(path, command.dtype)
            print(f"{path} is there already")
            continue
        pair = named.load()
        try:
            profile = measure(
                pair,
                decoder,
                max_draft_length=command.max_draft_length,
                max_target_tokens=command.max_target_tokens,
                sampling=named.sampling,
                batch_sizes=command.batch_sizes,
                contexts=command.contexts or None,
            )
        except ValueError as error:  # the arguments do not fit the pair or one another
            raise LatencyProfileError(f"{name} cannot be measured: {error}") from error
        if profile.doubts:
            raise LatencyProfileError(
                f"{path} is not written, as what was measured cannot be right: {'; '.join(profile.doubts)}. Give the "
                "same command again when the machine does nothing else"
            )
        profile.save(path)
        token = "drafted token" if profile.kind == CHAIN else "token read"
        print(
            f"{path}: {1000 * profile.autoregressive_seconds:.2f} ms/token plain, one more {token} adds "
            f"{profile.marginal_cost():.2f} of that"
        )


def _require_type(path: Path, dtype: str | None) -> None:
    """Raise an error if a profile that is there was measured with another type than is asked for."""
    measured_with = LatencyProfile.load(path).hardware.get("dtype")
    if dtype is not None and measured_with != dtype:
        raise LatencyProfileError(
            f"{path} is there already, of weights in {measured_with}, and --dtype is {dtype}; give another --out"
        )


def _present(arguments: Sequence[str]) -> list[str]:
    """Replace an option's earlier name."""
    if "--rounds" in arguments:
        warnings.warn("--rounds is called --decoder now", DeprecationWarning, stacklevel=3)
    return ["--decoder" if argument == "--rounds" else argument for argument in arguments]


if __name__ == "__main__":
    sys.exit(run_command(main))
