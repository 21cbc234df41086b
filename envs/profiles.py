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
    MixedProfile,
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
    asked = traits_of(decoder) if isinstance(decoder, str) else decoder
    if replayed or profile.chances is not None or asked is None or not asked.stops_by_gain:
        return profile
    from .recordings.trace_recorder import chances_for  # which imports torch, too

    return replace(profile, chances=chances_for(named))


def mixed_profile_of(
    named: Workload, profile: MixedProfile | str | Path | None, *, replayed: bool, drafts: tuple[str, ...] | None = None
) -> MixedProfile:
    """Return the profile by which a choice between the drafts of a workload's pair is charged.

    Args:
        named: the workload.
        profile: a profile, or a file with one; None for the default.
        replayed: whether the default is the pair's reference profile, if one ships. Otherwise the pair is measured on
            this hardware, for which it is loaded; measured once, it is read from the cache.
        drafts: names of the drafts that it must be of; None for any.

    Raises:
        LatencyProfileError: the file is missing or damaged, or the profile is of other drafts.
        ValueError: the pair has no draft. Loading errors as for `load_pair`, where no profile is given.
    """
    if isinstance(profile, str | Path):
        profile = MixedProfile.load(profile)
    if profile is not None:
        chosen = profile
    elif replayed and isinstance(named.pair, str) and (file := REFERENCES / mixed_profile_name(named)).is_file():
        chosen = _loaded_mixed(file)
    else:
        from specgym.decoding import measured_mixed  # which imports torch; a replay needs none

        chosen = measured_mixed(named.load(), sampling=named.sampling)
    return chosen if drafts is None else chosen.require_drafts(drafts)


def mixed_profile_name(named: Workload) -> str:
    """Return the file name of a mixed profile that serves a workload."""
    pair = named.pair if isinstance(named.pair, str) else named.pair.name
    return f"{file_name(pair)}.mixed.{arithmetic_of(named.sampling)}.json"


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


@functools.lru_cache(maxsize=64)
def _loaded_mixed(path: Path) -> MixedProfile:
    return MixedProfile.load(path)


@dataclass(frozen=True)
class ProfileCommand:
    """Measure how long decoding's rounds take on this machine, which should do nothing else meanwhile."""

    workloads: tuple[str, ...]
    """pair/prompts or pair/prompts@temperature. Prompts do not matter here: workloads of one pair that are all greedy
    share a profile, and for a decoder without a draft those of one target. Of a pair with several drafts every draft is
    timed by the tokens that it has to read first."""
    out: Path = Path("latency")
    """Folder of the profiles."""
    decoder: str = CHAIN
    """Registered decoder whose rounds are timed, or `chain` for those of every decoder that drafts chains of tokens."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences decoded together, at which to measure; for all but chains, and for several drafts, 1 alone."""
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
    for name in command.workloads:
        named = workload(name)
        mixed = named.mixed and decoder is None
        path = command.out / (mixed_profile_name(named) if mixed else profile_name(named, decoder))
        if path.is_file():
            _require_type(path, command.dtype, MixedProfile if mixed else LatencyProfile)
            print(f"{path} is there already")
            continue
        try:
            profile = _measure_mixed(command, named) if mixed else _measure(command, named, decoder)
        except ValueError as error:  # the arguments do not fit the pair or one another
            raise LatencyProfileError(f"{name} cannot be measured: {error}") from error
        if profile.doubts:
            raise LatencyProfileError(
                f"{path} is not written, as what was measured cannot be right: {'; '.join(profile.doubts)}. Give the "
                "same command again when the machine does nothing else"
            )
        profile.save(path)
        print(f"{path}: {1000 * profile.autoregressive_seconds:.2f} ms/token plain, {_costs(profile)}")


def _measure(command: ProfileCommand, named: Workload, decoder: str | None) -> LatencyProfile:
    from specgym.decoding import measure

    return measure(
        named.load(),
        decoder,
        max_draft_length=command.max_draft_length,
        max_target_tokens=command.max_target_tokens,
        sampling=named.sampling,
        batch_sizes=command.batch_sizes,
        contexts=command.contexts or None,
    )


def _measure_mixed(command: ProfileCommand, named: Workload) -> MixedProfile:
    from specgym.decoding import measure_mixed

    if command.batch_sizes != (1,) or command.contexts or command.max_target_tokens is not None:
        raise LatencyProfileError(
            "several drafts are timed for one text at a time, behind a short prompt; leave out --batch-sizes, "
            "--contexts and --max-target-tokens"
        )
    return measure_mixed(named.load(), max_draft_length=command.max_draft_length, sampling=named.sampling)


def _costs(profile: LatencyProfile | MixedProfile) -> str:
    """Describe what drafting adds to a round."""
    if isinstance(profile, LatencyProfile):
        token = "drafted token" if profile.kind == CHAIN or profile.overlaps else "token read"
        return f"one more {token} adds {profile.marginal_cost():.2f} of that"
    tokens = (f"{1000 * draft.reading(1):.3g} ms by {draft.name}" for draft in profile.drafts)
    return f"a drafted token takes {', '.join(tokens)}"


def _require_type(path: Path, dtype: str | None, kind: type[LatencyProfile | MixedProfile]) -> None:
    """Raise an error if a profile that is there was measured with another type than is asked for."""
    measured_with = kind.load(path).hardware.get("dtype")
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
