"""Cost of deciding whether to stop beside drafting a token, for the shipped pairs that draft with a model.

    python -m benchmarks.stop_rule_cost                                     # the network as it is before learning
    python -m benchmarks.stop_rule_cost --policy runs/NAME/seed-0           # one that was learned; as fast

*Rule* is a call of the exported policy. *Features* is what it needs to know: confidence and entropy of the draft's
distribution and their bookkeeping. The two are timed between the live draft steps that they are compared with.

The claim to check: the rule takes less than 3 % of a draft step.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from gymnasium import spaces
from rich.console import Console
from rich.table import Table

from specgym.agents import ExportedStopRule, StoppingPolicy
from specgym.decoding import FEATURES, GREEDY, DraftTracker, load_pair
from specgym.envs import workload


@dataclass
class Settings:
    """Measure what a decision costs."""

    pairs: tuple[str, ...] = ("tiny", "tiny-10m-2l", "tiny-10m-xs", "tiny-10m-3m", "tiny-3m-1l")
    """Shipped pairs that draft with a model."""
    policy: Path | None = None
    """Folder of an exported policy."""
    tokens: int = 16
    """Drafted from each prompt."""
    prompts: int = 40
    """Prompts drafted from."""


def untrained() -> ExportedStopRule:
    """The network that learning starts from."""
    low = np.array([*(feature.low for feature in FEATURES), -32], np.float32)
    high = np.array([*(feature.high for feature in FEATURES), 32], np.float32)
    layers = {"pi": [32, 32], "vf": [64, 64]}
    return ExportedStopRule.of(
        StoppingPolicy(spaces.Box(low, high), spaces.Discrete(2), lambda _: 1e-3, net_arch=layers)
    )


@torch.inference_mode()
def microseconds(name: str, rule: ExportedStopRule, settings: Settings) -> tuple[float, float, float]:
    """Medians of a draft step, its features, and the rule."""
    pair = load_pair(name)
    assert pair.draft is not None
    prompts = workload(f"{name}/prose").prompt_ids("test")[: settings.prompts]
    drafting, observing, deciding = [], [], []
    for prompt in prompts:
        session = pair.draft.start(prompt, GREEDY, torch.Generator(), pair.target.device)
        steps = session.steps(prompt, settings.tokens)
        tracker = DraftTracker(1, 0.2)
        for _ in range(settings.tokens):
            began = time.perf_counter()
            step = next(steps)
            drafted = time.perf_counter()
            tracker.drafted(step.confidence(), step.entropy(), step.matched, step.drawn_probability())
            observed = time.perf_counter()
            rule(tracker.features)
            decided = time.perf_counter()
            drafting.append(drafted - began)
            observing.append(observed - drafted)
            deciding.append(decided - observed)
    step_time, features_time, rule_time = (
        1e6 * statistics.median(seconds) for seconds in (drafting, observing, deciding)
    )
    return step_time, features_time, rule_time


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    rule = ExportedStopRule.load(settings.policy) if settings.policy else untrained()
    table = Table(title="microseconds, medians, one thread")
    for heading in ("pair", "draft step", "features", "rule", "rule / draft step", "both / draft step"):
        table.add_column(heading, justify="left" if heading == "pair" else "right")
    for name in settings.pairs:
        step, features, decision = microseconds(name, rule, settings)
        table.add_row(
            name,
            f"{step:.0f}",
            f"{features:.1f}",
            f"{decision:.1f}",
            f"{decision / step:.1%}",
            f"{(features + decision) / step:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
