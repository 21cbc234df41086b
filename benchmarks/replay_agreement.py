"""Agreement of replayed threshold decoding with live decoding, over a grid of thresholds.

    python -m benchmarks.replay_agreement                                   # the default workloads, about 15 minutes
    python -m benchmarks.replay_agreement --workloads tiny/prose tiny/code --prompts 6

None of the grid's fallbacks is one at which detours are recorded, and of its rollbacks only 1 is; the second line of a
workload is of those settings alone. Live decoding and
replay get the same prompts, end drafts by the same costs and chances, and are charged by the same latency profile, the
pair's reference. *Own text only* is replay without detours: it goes on in the target's own text, whatever was kept.

The claims to check: rank correlation of ms/token at least 0.9, mean absolute error of the acceptance rate at most 0.03.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specgym.decoding import LatencyProfile, ThresholdDecoder, write_json
from specgym.envs import ReplayTable, Trace, TraceWalk, decode_prompts, find_trace, profile_of, summarise, workload

FALLBACKS = (0.05, 0.2, 0.35, 0.45, 0.55, 0.7, 0.9)
ROLLBACKS = (1.0, 2.0, 6.0, 10.0)
GRID = tuple(itertools.product(FALLBACKS, ROLLBACKS))
ONE_BACK = np.array([rollback == 1 for _, rollback in GRID])
"""Settings with the rollback of the detours, near which the fastest ones lie."""


@dataclass
class Settings:
    """Compare replay with live decoding."""

    workloads: tuple[str, ...] = ThresholdDecoder.workloads
    """Workloads whose traces ship; without detours, both kinds of replay are the same."""
    prompts: int = 8
    """Test prompts of each, at most as many as have detours."""
    tokens: int = 32
    """Generated for each."""
    replays: int = 32
    """Replays of a prompt and setting."""
    live_seeds: int = 1
    """Live texts of a prompt and setting; sampled workloads take four times as many."""
    threads: int = 1
    """torch's."""
    json: Path | None = None
    """File to write the figures of all settings to, too."""


def live(name: str, profile: LatencyProfile, trace: Trace, settings: Settings) -> NDArray[np.float64]:
    """(ms/token, acceptance rate, divergence) of every setting of the grid, shape (settings, 3)."""
    result = workload(name).with_split("test")
    decoder = ThresholdDecoder(result.load(), trace.draft_length)
    decoder.charge_by(profile)
    prompts = result.prompt_ids()[: settings.prompts]
    seeds = settings.live_seeds * (1 if result.sampling.greedy else 4)
    rows = []
    for fallback, rollback in track(GRID, name):
        knobs = {"fallback": fallback, "rollback": rollback}
        texts = [
            text
            for seed in range(seeds)
            for text in decode_prompts(decoder, knobs, prompts, settings.tokens, result.sampling, 1000 * seed)
        ]
        metrics = summarise(decoder, texts, profile)
        rows.append((metrics["ms_per_token"], metrics["draft_acceptance_rate"], metrics["divergence"]))
    return np.array(rows)


def replayed(profile: LatencyProfile, trace: Trace, settings: Settings, detours: bool) -> NDArray[np.float64]:
    """Replayed values of every setting of the grid, shape (settings, 3)."""
    table = ReplayTable([trace], detours=detours, profiles=[profile])
    replay = TraceWalk(table, profile.round_seconds(trace.draft_length)[None], settings.tokens, by_gain=True)
    prompts = np.repeat(np.arange(settings.prompts), settings.replays)
    random = np.random.default_rng(0)
    rows = []
    for fallback, rollback in GRID:
        everywhere = np.ones(len(prompts))
        sums = replay.decode_many(
            prompts,
            np.zeros(len(prompts), np.int64),
            fallback * everywhere,
            rollback * everywhere,
            np.full(len(prompts), trace.draft_length),
            random,
        )
        total = {key: values.sum() for key, values in sums.items()}
        seconds, divergence = (total[name] / total["tokens"] for name in ("seconds", "total_variation"))
        rows.append((1000 * seconds, total["accepted"] / max(total["drafted"], 1), divergence))
    return np.array(rows)


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def agreement(real: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, float]:
    """Rank correlation and mean relative error of ms/token; mean and greatest error of the other two."""
    error, strayed = np.abs(real[:, 1:] - other[:, 1:]).T
    with np.errstate(invalid="ignore"):  # settings that all decode alike have no ranks to compare
        rank_correlation = float(np.corrcoef(ranks(real[:, 0]), ranks(other[:, 0]))[0, 1])
    return {
        "rank_correlation": rank_correlation,
        "ms_per_token_error": float(np.abs(other[:, 0] / real[:, 0] - 1).mean()),
        "acceptance_error": float(error.mean()),
        "acceptance_error_max": float(error.max()),
        "divergence_error": float(strayed.mean()),
        "divergence_error_max": float(strayed.max()),
    }


def main() -> None:
    """Measure, print, and write."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    table = Table(title=f"{len(GRID)} settings, {settings.prompts} test prompts, {settings.tokens} tokens each")
    for heading in ("workload", "rank correlation of ms/token", "error of ms/token", "error of acceptance rate",
                    "greatest", "error of divergence", "greatest", "own text only: rank", "acceptance",
                    "divergence"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    report = {}
    for name in settings.workloads:
        trace, result = find_trace(None, name, "test")
        charged = profile_of(result, None, replayed=True, decoder=ThresholdDecoder.name)
        profile = replace(charged, chances=trace.chances)
        real = live(name, profile, trace, settings)
        with_detours, without = (replayed(profile, trace, settings, detours) for detours in (True, False))
        report[name] = {"grid": GRID, "live_values": real.tolist(), "replayed_values": with_detours.tolist()}
        for which, chosen in (("", np.ones(len(GRID), np.bool_)), (", rollback 1", ONE_BACK)):
            good, plain = (agreement(real[chosen], other[chosen]) for other in (with_detours, without))
            table.add_row(
                f"{name}{which}",
                f"{good['rank_correlation']:.3f}",
                f"{good['ms_per_token_error']:.1%}",
                f"{good['acceptance_error']:.4f}",
                f"{good['acceptance_error_max']:.3f}",
                f"{good['divergence_error']:.4f}",
                f"{good['divergence_error_max']:.3f}",
                f"{plain['rank_correlation']:.3f}",
                f"{plain['acceptance_error']:.4f}",
                f"{plain['divergence_error']:.4f}",
            )
            report[name] |= {f"replay{which}": good, f"own_text_only{which}": plain}
        if settings.json:
            write_json(settings.json, report)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
