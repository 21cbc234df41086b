"""Agreement of decoding replayed from recorded outcomes with live decoding, at settings that were not recorded.

    python -m benchmarks.outcome_agreement                                  # shipped Lookahead workloads, half an hour
    python -m benchmarks.outcome_agreement --workloads tiny-3m/code --settings 12

The settings are drawn as an environment's episodes draw their first, without those recorded. Live decoding gets the
prompts that were recorded, and both sides are charged by the same latency profile, so what differs is what the
interpolation gets wrong.
For comparison the error that the recording states of itself, by leaving each of its settings out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.agents import default_settings
from specgym.decoding import LatencyProfile, Split, build_decoder, traits_of, write_json
from specgym.envs import (
    KnobMoves,
    OutcomeReplay,
    Outcomes,
    Workload,
    decode_prompts,
    find_recording,
    outcomes_name,
    profile_of,
    summarise,
)

_TRIES = 50


@dataclass
class Settings:
    """Compare replayed outcomes with live decoding."""

    workloads: tuple[str, ...] = default_settings("lookahead").workloads
    """Recorded workloads."""
    decoder: str = "lookahead"
    """Decoder whose outcomes were recorded."""
    recordings: Path | None = None
    """Folder of the recordings; by default those that ship."""
    split: Split = "train"
    """Split of the prompts."""
    settings: int = 16
    """Settings of the knobs that were not recorded."""
    seed: int = 1
    """Seed of their choice."""
    threads: int = 1
    """torch's."""
    json: Path | None = None
    """File to write the figures of all settings to, too."""


def unrecorded(outcomes: Outcomes, count: int, seed: int) -> NDArray[np.float64]:
    """Settings drawn as episodes draw their first, none of them recorded, shape (settings, knobs).

    Fewer than asked for where hardly any were not recorded.
    """
    info, random = outcomes.info, np.random.default_rng(seed)
    ranges = {knob.name: (knob.low, knob.high) for knob in info.knobs}
    options = traits_of(info.decoder).accepted_options(max_draft_length=info.draft_length or 1)
    moves = KnobMoves(traits_of(info.decoder).knobs_without_pair(**options), ranges, None)
    known = {tuple(setting) for setting in outcomes.settings.tolist()}
    chosen: dict[tuple[float, ...], None] = {}
    for _ in range(_TRIES * count):
        if len(chosen) == count:
            break
        drawn = tuple(moves.values(moves.drawn(random)).values())
        if drawn not in known:
            chosen[drawn] = None
    return np.array(list(chosen))


def live(
    result: Workload, outcomes: Outcomes, profile: LatencyProfile, settings: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """`speedup` and `mean_acceptance_length` of decoding the recorded prompts with each setting, shape (settings,)."""
    info = outcomes.info
    options = traits_of(info.decoder).accepted_options(max_draft_length=info.draft_length or 1)
    decoder = build_decoder(info.decoder, result.load(), **options)
    prompts = result.prompt_ids()[: outcomes.prompts]
    rows = []
    for number, setting in enumerate(track(settings.tolist(), result.name)):
        knobs = dict(zip((knob.name for knob in info.knobs), setting, strict=True))
        texts = decode_prompts(decoder, knobs, prompts, info.tokens, result.sampling, 1000 * (number + 1))
        rows.append(summarise(decoder, texts, profile))
    return {name: np.array([row[name] for row in rows]) for name in ("speedup", "mean_acceptance_length")}


def main() -> None:
    """Measure, print, and write."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    table = Table(
        title=f"{settings.settings} settings of {settings.decoder} that were not recorded, {settings.split} prompts"
    )
    for heading in ("workload", "recorded", "prompts", "speedup off by, mean", "greatest", "tokens a round, mean",
                    "stated by leaving out, mean", "greatest"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    report = {}
    for name in settings.workloads:
        path = settings.recordings and settings.recordings / outcomes_name(name, settings.decoder, settings.split)
        outcomes, result = find_recording(settings.decoder, path, name, settings.split)
        if not isinstance(outcomes, Outcomes):
            sys.exit(
                f"error: {settings.decoder} is replayed from a trace, for which there is benchmarks.replay_agreement; "
                "its outcomes are compared with --recordings"
            )
        profile = profile_of(result, None, replayed=True, decoder=settings.decoder).at()
        replay = OutcomeReplay([outcomes], [profile], outcomes.info.tokens)
        chosen = unrecorded(outcomes, settings.settings, settings.seed)
        real, means = live(result, outcomes, profile, chosen), replay.means(0, chosen)
        replayed = {
            "speedup": profile.autoregressive_seconds / means["seconds"],
            "mean_acceptance_length": 1 / means["rounds"],
        }
        off = {key: np.abs(replayed[key] / real[key] - 1) for key in real}
        stated = replay.leave_one_out[0]
        table.add_row(
            name,
            str(len(outcomes.settings)),
            str(outcomes.prompts),
            f"{off['speedup'].mean():.1%}",
            f"{off['speedup'].max():.1%}",
            f"{off['mean_acceptance_length'].mean():.1%}",
            f"{stated.mean:.1%}",
            f"{stated.worst:.1%}",
        )
        report[name] = {
            "settings": chosen.tolist(),
            "live": {key: values.tolist() for key, values in real.items()},
            "replayed": {key: values.tolist() for key, values in replayed.items()},
            "stated": {"mean": stated.mean, "worst": stated.worst},
        }
        if settings.json:
            write_json(settings.json, report)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
