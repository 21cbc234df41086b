"""The shipped tuner of exact decoding on real pairs, by the clock, against the closed form and the default.

    python -m benchmarks.worlds_live
    python -m benchmarks.worlds_live tiny tiny-3m-1l --repeats 5

On each pair the policy measures four settings on training prompts, live. The closed form of Leviathan et al. (arXiv
2211.17192) recommends a length by the same measurements. Held-out prompts are then decoded by all in turns, prompt by
prompt, so that a slow spell of the machine hits all alike. Methods with the same setting share what was decoded.

Six pairs take seven to eight minutes on two idle cores, nearly all of them for SmolLM2. The result of each pair is
kept: the same command goes on with the pairs that are missing, and begins anew in another folder (--out).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console

from specgym.agents import ClosedForm, Learned, interval, play, shipped_tuner, usual_setting
from specgym.decoding import (
    ENGINE_SETTINGS,
    AutoregressiveDecoder,
    Side,
    SpeculativeDecoder,
    decode_in_turns,
    file_name,
    measure,
    write_json,
)
from specgym.envs import LivePair, Workload, knobs_of, workload

Seconds = NDArray[np.float64]
METHODS = ("default", "closed form", "learned")
RESAMPLES = 4000


@dataclass
class Settings:
    """Compare settings on real pairs, by the clock."""

    pairs: tyro.conf.Positional[tuple[str, ...]] = (
        "smollm2-2l",
        "smollm2-4l",
        "smollm2-lookup",
        "smollm2-ngram",
        "tiny",
        "tiny-3m-1l",
    )
    """Pairs of models."""
    engine: str = "transformers"
    """Engine whose stop rule and default are taken."""
    text: str = "prose"
    """Prompt set."""
    measurements: int = 4
    """Settings that the policy may measure."""
    measured_tokens: int = 16
    """Tokens decoded after each prompt of a measurement."""
    prompts: int = 6
    """Held-out prompts."""
    tokens: int = 20
    """Tokens decoded after each of them."""
    repeats: int = 2
    """Passes over the held-out prompts."""
    seconds: float = 10.0
    """Time for measuring the rounds of a pair, at most."""
    threads: int = 1
    """Threads of torch."""
    out: Path = Path("benchmarks/worlds_live")
    """Folder of the results of each pair."""


@dataclass(frozen=True)
class Compared:
    """Seconds a token on one pair.

    Attributes:
        knobs: of each method.
        seconds: of each method and plain decoding, by prompt, all passes together.
        tokens: likewise.
    """

    knobs: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, Sequence[float]]
    tokens: Mapping[str, Sequence[int]]

    def ratio(self, method: str, over: str = "plain") -> tuple[float, float, float]:
        """Speed of a method over that of another, with a 95 % interval from a bootstrap over prompts."""
        count = len(self.seconds[method])
        drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        ways = np.concatenate([np.arange(count)[None], drawn])
        rates = {
            name: np.array(self.seconds[name])[ways].sum(1) / np.array(self.tokens[name])[ways].sum(1)
            for name in (method, over)
        }
        ratios: Seconds = rates[over] / rates[method]
        return float(ratios[0]), *interval(ratios[1:])


def chosen_knobs(named: Workload, settings: Settings) -> tuple[LivePair, dict[str, dict[str, float]]]:
    """Let the policy measure and recommend on training prompts; return the pair and the knobs of every method."""
    profile = measure(named.load(), sampling=named.sampling, time_limit=settings.seconds)  # of this very hour
    world = LivePair(named, settings.engine, profile, settings.measured_tokens)
    learned = Learned(world, settings.measurements, shipped_tuner())
    closed_form = ClosedForm(world, settings.measurements)
    for setting, readings in play(learned, world, settings.measurements, lambda message: None):
        closed_form.add(np.array([setting]), readings)
    return world, {
        "default": usual_setting(settings.engine, world.threshold),
        "closed form": knobs_of(int(closed_form.recommend()[0]), world.threshold),
        "learned": knobs_of(int(learned.recommend()[0]), world.threshold),
    }


def compare(named: Workload, settings: Settings) -> Compared:
    """Choose settings on one workload's training prompts, and decode its held-out ones by all in turns."""
    world, knobs = chosen_knobs(named, settings)
    longest = max(int(values["draft_length"]) for values in knobs.values())
    stop = ENGINE_SETTINGS[settings.engine].stop if world.threshold else "never"
    drafting = SpeculativeDecoder(named.load(), max(longest, 1), stop=stop)
    plain = Side(AutoregressiveDecoder(named.load()))
    by_setting = {str(values): Side(drafting, values) for values in knobs.values() if values["draft_length"]}
    sides = {"plain": plain, **by_setting}
    chosen = named.prompt_ids("test")[: settings.prompts]
    seconds, tokens = {name: np.zeros(len(chosen)) for name in sides}, {name: np.zeros(len(chosen)) for name in sides}
    for number in range(settings.repeats):
        order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        turns = decode_in_turns(
            {name: sides[name] for name in order}, chosen, max_new_tokens=settings.tokens, sampling=named.sampling
        )
        for place, turn in enumerate(turns):
            for name, generation in turn.items():
                seconds[name][place] += generation.seconds
                tokens[name][place] += len(generation.tokens)
    of_method = {"plain": "plain"} | {
        method: str(values) if values["draft_length"] else "plain" for method, values in knobs.items()
    }
    return Compared(
        knobs,
        {method: seconds[name].tolist() for method, name in of_method.items()},
        {method: [int(count) for count in tokens[name]] for method, name in of_method.items()},
    )


def main() -> None:
    """Print a Markdown table."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.worlds_live", description=__doc__)
    torch.set_num_threads(settings.threads)
    console = Console()
    results = {}
    protocol = {name: value for name, value in asdict(settings).items() if name not in ("pairs", "out")}
    for pair in settings.pairs:
        path = settings.out / f"{file_name(pair)}.{settings.engine}.json"
        if not path.is_file() or json.loads(path.read_text())["protocol"] != protocol:
            with console.status(pair):
                compared = compare(workload(f"{pair}/{settings.text}"), settings)
            write_json(path, {"protocol": protocol, "compared": asdict(compared)})
        results[pair] = Compared(**json.loads(path.read_text())["compared"])
    print(f"| pair | {', '.join(METHODS)} | default | closed form | learned | learned / closed form |")
    print("|---|---|---|---|---|---|")
    for pair, result in results.items():
        shown = "; ".join(", ".join(f"{value:.3g}" for value in result.knobs[method].values()) for method in METHODS)
        cells = [result.ratio(method) for method in METHODS] + [result.ratio("learned", "closed form")]
        print(f"| `{pair}` | {shown} | " + " | ".join(f"{a:.2f} ({b:.2f} to {c:.2f})" for a, b, c in cells) + " |")
    means = [np.mean([np.log(result.ratio(method)[0]) for result in results.values()]) for method in METHODS]
    ratios = " | ".join(f"{np.exp(mean):.2f}" for mean in (*means, means[-1] - means[1]))
    print(f"| geometric mean | | {ratios} |")


if __name__ == "__main__":
    main()
