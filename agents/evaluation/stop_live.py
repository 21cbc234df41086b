"""The same rules in live decoding, beside their replay: whether replay told the truth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from specgym.decoding import AutoregressiveDecoder, Decoder, Generation, LatencyProfile, SpeculativeDecoder, StopRule
from specgym.envs import Trace, workload

from ..experiments.stop_drafts import StoppingSettings
from .stop_baselines import UpperConfidenceBound
from .stop_results import choose, replayed

REPEATS = 3
"""How often every prompt is timed by the clock with each method; the median counts."""


@dataclass(frozen=True)
class LiveRow:
    """One method on one workload: throughput relative to plain decoding, measured in three ways.

    Attributes:
        workload: its name.
        method: as in the comparison; the learned policy is that of one seed.
        rule: the rule as it was chosen.
        replayed: by replay, charged by the latency profile.
        charged: live, charged by the latency profile.
        clock: live, by the clock.
        clock_ms_per_token: live, by the clock, in milliseconds.
    """

    workload: str
    method: str
    rule: str
    replayed: float
    charged: float
    clock: float
    clock_ms_per_token: float


def compare_live(
    settings: StoppingSettings,
    name: str,
    learned: StopRule,
    profile: LatencyProfile,
    train: Trace,
    test: Trace,
    tell: Callable[[str], None] = lambda message: None,
) -> list[LiveRow]:
    """Decode a workload's test prompts live with every method but the oracle, at batch size 1.

    The methods take turns prompt by prompt, so that a slow spell of the machine hits them alike. The bandit begins
    anew, live and in its replay here, and learns from text to text, in replay from all side by side. Loads the pair;
    loading errors as for `load_pair`.

    Args:
        settings: of the run.
        name: of the workload.
        learned: the policy to decode with.
        profile: what the charged columns are charged by.
        train: trace of the training prompts, on which rules are chosen.
        test: trace of the test prompts, which are decoded.
        tell: called with what is being done.
    """
    found = workload(name)
    pair = found.load()
    prompts = found.prompt_ids("test")[: test.prompts]
    rules: dict[str, StopRule] = {
        **choose(replayed(settings, train, profile, 1)).simple,
        "bandit": UpperConfidenceBound(settings.max_draft_length),
        "learned": learned,
    }
    replays = replayed(settings, test, profile, 1).decode(list(rules.values()))
    point = profile.at(batch_size=1)
    decoders: dict[str, Decoder] = {"autoregressive": AutoregressiveDecoder(pair)}
    for method, rule in rules.items():
        decoders[method] = SpeculativeDecoder(
            pair, settings.max_draft_length, stop=rule, cost_ratio=point.marginal_cost()
        )
    for decoder in decoders.values():  # the first generation pays for what is set up once
        decoder.generate(prompts[0], max_new_tokens=min(8, settings.tokens), sampling=found.sampling, seed=0)
    made: dict[str, list[list[Generation]]] = {method: [[] for _ in prompts] for method in decoders}
    for repeat in range(REPEATS):
        for number, prompt in enumerate(prompts):
            tell(f"{name}: prompt {number + 1} of {len(prompts)}, {repeat + 1} of {REPEATS} times")
            for method, decoder in decoders.items():
                made[method][number].append(
                    decoder.generate(
                        prompt,
                        max_new_tokens=settings.tokens,
                        sampling=found.sampling,
                        seed=test.info.seed + number + 10_000 * repeat,
                    )
                )
    plain = _clock(made["autoregressive"])
    rows = [LiveRow(name, "autoregressive", "no draft", 1.0, 1.0, 1.0, 1000 * plain)]
    for (method, rule), replay in zip(rules.items(), replays, strict=True):
        seconds = _clock(made[method])
        charged = _charged(made[method], point)
        rows.append(LiveRow(name, method, rule.name, replay.throughput, charged, plain / seconds, 1000 * seconds))
    return rows


def rendered_live(rows: Sequence[LiveRow], title: str) -> Table:
    """A rich table, with a line for each method."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("workload\n  method", min_width=16, max_width=26, overflow="fold")
    table.add_column("rule", no_wrap=True)
    for heading in ("replayed,\ncharged", "live,\ncharged", "live,\nclock", "clock ms\n/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    before: str | None = None
    for row in rows:
        if row.workload != before:
            if before is not None:
                table.add_section()
            table.add_row(row.workload)
        table.add_row(
            f"  {row.method}",
            row.rule,
            f"{row.replayed:.3f}",
            f"{row.charged:.3f}",
            f"{row.clock:.3f}",
            f"{row.clock_ms_per_token:.2f}",
            style="bold" if row.method == "learned" else None,
        )
        before = row.workload
    table.caption = (
        "Throughput relative to plain decoding on the test prompts. Charged by the run's latency profile, or by the "
        f"clock: medians of {REPEATS}, all methods in turn."
    )
    return table


def agreement(rows: Sequence[LiveRow]) -> str:
    """How far replay is from live decoding, in a sentence; without the bandit, which has learned from other texts."""
    drafted = [row for row in rows if row.method not in ("autoregressive", "bandit")]
    off = max(drafted, key=lambda row: abs(row.charged / row.replayed - 1))
    distance = abs(off.charged / off.replayed - 1)
    return (
        f"Charged the same way, live decoding differs from its replay by at most {distance:.1%} ({off.method} on "
        f"{off.workload})."
    )


def _charged(made: Sequence[Sequence[Generation]], point: LatencyProfile) -> float:
    texts = [generation for repeats in made for generation in repeats]
    tokens = sum(len(text.tokens) for text in texts)
    return tokens * point.autoregressive_seconds / sum(point.charge(text.rounds) for text in texts)


def _clock(made: Sequence[Sequence[Generation]]) -> float:
    """Seconds per token by the clock: the median over repeats of each prompt, then all prompts together."""
    each: Mapping[int, float] = {
        number: statistics.median(text.seconds / len(text.tokens) for text in repeats)
        for number, repeats in enumerate(made)
    }
    lengths = [statistics.mean(len(text.tokens) for text in repeats) for repeats in made]
    return sum(each[number] * length for number, length in enumerate(lengths)) / sum(lengths)
