"""Steps a second of the replayed environments, and of the live one next to them.

    python -m benchmarks.replay_speed                                       # the trace of tiny/prose that ships
    python -m benchmarks.replay_speed --workload tiny/code --trace traces/tiny_code.train.npz

Everything runs in one process with one thread. A tuning step decodes 32 tokens, a control step decides about one
drafted token, and a choice who of five drafts proposes it. Actions are random; 3 in 10 stop the draft.

The claims to check, on one core: at least 200,000 tuning steps/s with 1,024 environments and 5,000 with one, at least
1,000,000 control steps/s and 400,000 choices/s with 4,096.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import specgym  # noqa: F401  # registers the environments
from specgym.decoding import LatencyProfile, measured
from specgym.envs import find_trace

_CLAIMS = {
    "tuning, 1,024 together": 200_000,
    "tuning, one": 5_000,
    "control, 4,096 together": 1_000_000,
    "choice, 4,096 together": 400_000,
}
_KEPT = 32  # sets of actions made beforehand, so that making them is not timed


@dataclass
class Settings:
    """Measure the speed of replay."""

    workload: str = "tiny/prose"
    """Workload to decode."""
    trace: Path | None = None
    """Its trace; by default the one that ships."""
    choice: str = "tiny-10m-mixed/prose"
    """Workload whose pair has several drafts, to choose among them."""
    seconds: float = 2.0
    """For which each is repeated; 5 times, and the median counts."""
    live_steps: int = 40
    """Steps of the live environment; 0 leaves it out."""
    json: Path | None = None
    """File to write the figures to, too."""


def steps_per_second(step: Callable[[int], None], environments: int, seconds: float) -> float:
    """The median over five spells of repeating a step, called with its number."""
    rates, number = [], 0
    for _ in range(5):
        started, first = time.perf_counter(), number
        while time.perf_counter() - started < seconds / 5:
            step(number)
            number += 1
        rates.append(environments * (number - first) / (time.perf_counter() - started))
    return statistics.median(rates)


def single(env: gymnasium.Env[Any, Any]) -> Callable[[int], None]:
    """Steps of one environment, episode after episode."""
    env.reset(seed=0)
    space = env.action_space
    space.seed(0)
    actions = [space.sample() for _ in range(_KEPT)]

    def step(number: int) -> None:
        if any(env.step(actions[number % _KEPT])[2:4]):
            env.reset()

    return step


def together(env: gymnasium.vector.VectorEnv[Any, Any, Any], actions: list[Any]) -> Callable[[int], None]:
    """Steps of many environments, which reset themselves."""
    env.reset(seed=0)

    def step(number: int) -> None:
        env.step(actions[number % _KEPT])

    return step


def rates(settings: Settings, profile: LatencyProfile) -> dict[str, float]:
    """Steps a second of each, live first."""
    known: dict[str, Any] = {"workload": settings.workload, "profile": profile}
    replay = {**known, "recording": settings.trace}
    draws = np.random.default_rng(0)
    result = {}
    if settings.live_steps:
        live = gymnasium.make("specgym/Thresholds-v0", **known)
        step = single(live)
        step(0)  # warm up
        started = time.perf_counter()
        for number in range(settings.live_steps):
            step(number)
        result["tuning, live"] = settings.live_steps / (time.perf_counter() - started)

    item = gymnasium.make("specgym/Thresholds-v0", backend="replay", disable_env_checker=True, **replay)
    result["tuning, one"] = steps_per_second(single(item), 1, settings.seconds)

    many = gymnasium.make_vec("specgym/Thresholds-v0", num_envs=1024, **replay)
    moves = [draws.uniform(-1, 1, many.action_space.shape or ()).astype(np.float32) for _ in range(_KEPT)]
    result["tuning, 1,024 together"] = steps_per_second(together(many, moves), 1024, settings.seconds)

    control = gymnasium.make_vec("specgym/DraftLength-v0", num_envs=4096, recording=settings.trace, **known)
    stops = [(draws.random(4096) < 0.3).astype(np.int64) for _ in range(_KEPT)]
    result["control, 4,096 together"] = steps_per_second(together(control, stops), 4096, settings.seconds)

    choice = gymnasium.make_vec("specgym/DraftChoice-v0", num_envs=4096, workload=settings.choice)
    drafts = [np.where(stop, 0, draws.integers(1, 6, 4096)) for stop in stops]
    result["choice, 4,096 together"] = steps_per_second(together(choice, drafts), 4096, settings.seconds)
    return result


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    _, workload = find_trace(settings.trace, settings.workload)
    result = rates(settings, measured(workload.load(), sampling=workload.sampling))
    live = result.get("tuning, live")
    table = Table(title=f"environment steps a second, {settings.workload}, one core")
    table.add_column("environments")
    for column in ("steps/s", "claimed, at least", "x live"):
        table.add_column(column, justify="right")
    for name, rate in result.items():
        claim = f"{_CLAIMS[name]:,}" if name in _CLAIMS else "-"
        ratio = f"{rate / live:,.0f}" if live and name.startswith("tuning") else "-"
        table.add_row(name, f"{rate:,.0f}", claim, ratio)
    Console().print(table)
    if settings.json:
        settings.json.write_text(
            json.dumps({"settings": asdict(settings), "steps_per_second": result}, indent=2, default=str)
        )


if __name__ == "__main__":
    main()
