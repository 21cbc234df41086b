"""Practice on recorded texts before an engine is set: the tuner tries settings on traces, at the engine's own costs.

A trace replays every draft length and stop rule of an engine in microseconds, and a few live measurements tell what a
round costs there. What replay finds best is then measured on the engine itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from specgym.decoding import LOOKUP, ArgumentError, Engine, LatencyProfile, resolve
from specgym.envs import (
    LENGTHS,
    MOST_MEASUREMENTS,
    PROFILED,
    Facts,
    ReplayedPair,
    length_of,
    recorded_workloads,
    threshold_of,
    workload,
)

from ..evaluation.worlds.methods import Learned
from ..export.recommend_exact import play
from ..export.worlds_policy import shipped_tuner

_AGAIN: Final = 4  # replayed measurements of every setting that was recommended anywhere


def check_recorded(names: Sequence[str]) -> None:
    """Refuse workloads that no shipped trace replays.

    Raises:
        ArgumentError: there is no trace; the message lists some that there are.
    """
    known = recorded_workloads("speculative")
    for name in names:
        if name not in known:
            greedy = [other for other in known if "@" not in other]
            raise ArgumentError(
                f"no trace of {name} ships to practise on; there are, among others: {', '.join(greedy[:12])}"
            )


def profile_of_engine(pair: str, facts: Facts, plain_seconds: float) -> LatencyProfile:
    """Return a latency profile by which a replay costs what an engine's rounds do.

    Args:
        pair: name of the pair that is replayed.
        facts: of the engine: what its rounds cost, in plain tokens.
        plain_seconds: of a plain token there.
    """
    short, long = float(facts.short_round[0]), float(facts.long_round[0])
    first, second = (drafted + 1 for drafted in PROFILED)
    rounds = {1: plain_seconds, first: plain_seconds * short, second: plain_seconds * long}
    nothing = {0: 0.0, int(LENGTHS[-1]): 0.0}  # drafting is part of the rounds' cost
    return LatencyProfile(pair, nothing, rounds, plain_seconds, {"engine": "by its own clock"})


def practised(
    recorded: Sequence[str], engine: Engine, facts: Facts, plain_seconds: float, seed: int
) -> list[Mapping[str, float]]:
    """Let the tuner practise on traces, and return what it recommends, the best over all traces first.

    Args:
        recorded: workloads that were recorded; those with a draft of another kind than the engine's are left out.
        engine: whose stop rule and costs are replayed.
        facts: of the engine.
        plain_seconds: of a plain token there.
        seed: fixes the texts of the measurements.

    Returns:
        Settings in the engine's terms, without plain decoding.
    """
    worlds = []
    for name in recorded:
        named = workload(name)
        if (resolve(str(named.pair)).draft == LOOKUP) == (engine.draft == LOOKUP):
            profile = profile_of_engine(str(named.pair), facts, plain_seconds)
            worlds.append(ReplayedPair(named, engine.name, profile, seed))
    recommended: set[int] = set()
    for world in worlds:
        session = Learned(world, MOST_MEASUREMENTS, shipped_tuner())
        play(session, world, MOST_MEASUREMENTS, lambda message: None)
        recommended.add(int(session.recommend()[0]))
    speeds = {
        setting: np.mean([np.log(world.measure(setting).speedup[0]) for world in worlds for _ in range(_AGAIN)])
        for setting in sorted(recommended)
        if length_of(np.array(setting))
    }
    best = sorted(speeds, key=lambda setting: -speeds[setting])
    thresholds = engine.threshold_knob is not None
    return [
        engine.setting(int(length_of(np.array(setting))), float(threshold_of(np.array(setting))) if thresholds else 0.0)
        for setting in best
    ]
