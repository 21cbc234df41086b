"""Several texts at a time: tokens a second by batch size and draft length, and where drafting stops paying.

    python -m benchmarks.batches                                  # a shipped pair
    python -m benchmarks.batches --pairs tiny smollm2-4l --sizes 1 2 4 8 --drafts 0 2 4
    python -m benchmarks.batches --pairs translator --sizes 1 4 8 # with an encoder
    python -m benchmarks.batches --endless 2000                   # memory over many texts that come and go
    python -m benchmarks.batches --live 8                         # live environments, together and apart
    python -m benchmarks.batches --beginnings --prompts 8         # prompts, one by one and in one pass

All numbers are over plain decoding of one text at a time (draft 0, batch size 1), the median over turns in which all
take part; the prompts, of several sets, are the same, and reading them does not count unless asked for. In brackets
the lowest and the highest. *transformers* is its `generate` of the same weights, on prompts padded to the longest.

The claims to check: 8 texts in one batch are decoded plainly at least 3 times as fast as one after another; memory
does not grow over 2,000 texts; live environments in one batch make 4 times the steps of those in processes.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import SubprocVecEnv
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import specgym  # noqa: F401  # registers the environments
from specgym.decoding import (
    AutoregressiveDecoder,
    Batch,
    Decoder,
    Pair,
    Sampling,
    SpeculativeDecoder,
    TextRequest,
    load_model,
    load_pair,
    measured,
    resolve,
)
from specgym.envs import workload

_SETS = ("prose", "code", "definitions", "chat")
PLAIN, STOCK = 0, -1
"""In the place of draft lengths: plain decoding, and that of transformers."""


@dataclass
class Settings:
    """Measure batches."""

    pairs: tuple[str, ...] = ("tiny",)
    """Pairs that draft with a model."""
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Texts at a time."""
    drafts: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Draft lengths, in tokens; 0 is plain decoding."""
    prompts: int = 16
    """Held-out prompts, of the pair's sets by turns."""
    tokens: int = 64
    """Tokens of each text."""
    temperature: float = 0.0
    """Sampling temperature."""
    threads: int = 1
    """Torch's."""
    reading: bool = False
    """Count the reading of prompts, too."""
    turns: int = 3
    """Turns in which everything is measured once."""
    endless: int = 0
    """Texts that come and go in a batch of 8, whose memory is measured in place of the speed."""
    beginnings: bool = False
    """Read the prompts one by one and in one pass, in place of generating."""
    live: int = 0
    """Live environments whose steps are measured in place of the speed."""


def prompts_of(pair: Pair, name: str, count: int) -> list[Sequence[int]]:
    """Held-out prompts of the sets that a pair has, by turns; sources of a translator."""
    names = _SETS if pair.target.source_limit is None else ("interface",)
    sets = [workload(f"{name}/{prompts}").prompt_ids("test") for prompts in names if _known(f"{name}/{prompts}")]
    return [sets[number % len(sets)][number // len(sets)] for number in range(count)]


def _known(name: str) -> bool:
    try:
        return bool(workload(name).prompt_ids("test"))
    except ValueError:
        return False


def speeds(name: str, settings: Settings) -> dict[tuple[int, int], list[float]]:
    """Seconds of every turn by batch size and draft length."""
    pair = load_pair(name)
    prompts = prompts_of(pair, name, settings.prompts)
    decoders: dict[int, Decoder[Any]] = {
        draft: AutoregressiveDecoder(pair) if draft == PLAIN else SpeculativeDecoder(pair) for draft in settings.drafts
    }
    stock = load_model(resolve(name).target)[0].eval()
    seconds = defaultdict[tuple[int, int], list[float]](list)
    for turn in range(settings.turns + 1):  # the first warms up, and passes are captured in it
        with pair.capturing(after=1 if turn == 0 else 2**62):
            for size in settings.sizes:
                if turn:
                    seconds[size, STOCK].append(_stock_seconds(stock, prompts, size, settings))
                for draft, decoder in decoders.items():
                    knobs: dict[str, float] = {} if draft == PLAIN else {"draft_length": draft}
                    taken = _seconds(decoder, prompts, size, knobs, settings)
                    if turn:
                        seconds[size, draft].append(taken)
    return dict(seconds)


def _seconds(
    decoder: Decoder[Any], prompts: Sequence[Sequence[int]], size: int, knobs: Mapping[str, float], settings: Settings
) -> float:
    """Seconds that texts take, a new one as soon as one ends."""
    batch, total = Batch(size), 0.0
    options: dict[str, Any] = {"max_new_tokens": settings.tokens, "sampling": Sampling(settings.temperature)}
    waiting = [TextRequest(decoder, prompt, **options, seed=number) for number, prompt in enumerate(prompts)]
    while waiting or len(batch):
        started = time.perf_counter()
        beginning = [waiting.pop(0) for _ in range(min(size - len(batch), len(waiting)))]
        errors = [result for result in batch.begin(beginning) if isinstance(result, Exception)]
        if errors:
            raise errors[0]
        total += settings.reading * (time.perf_counter() - started)
        started = time.perf_counter()
        batch.step(knobs)
        total += time.perf_counter() - started
    return total


@torch.inference_mode()
def _stock_seconds(model: Any, prompts: Sequence[Sequence[int]], size: int, settings: Settings) -> float:
    """Seconds that transformers' `generate` takes in batches, without those to the first tokens unless they count."""
    total = 0.0
    sampled: dict[str, Any] = {"temperature": settings.temperature} if settings.temperature else {}
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        for tokens, sign in ((1, settings.reading - 1), (settings.tokens, 1)):
            if model.config.is_encoder_decoder:  # transformers 5.23 gives a cache as many layers as the encoder has
                sampled["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample="temperature" in sampled,
                pad_token_id=0,
                **sampled,
            )
            total += sign * (time.perf_counter() - started)
    return total


def show_speeds(name: str, settings: Settings, console: Console) -> None:
    """Measure a pair, and print its table."""
    seconds = speeds(name, settings)
    baseline = seconds[min(settings.sizes), PLAIN]
    table = Table(title=f"{name}: tokens/s over plain decoding of one text, {settings.threads} thread(s)")
    table.add_column("texts", justify="right")
    columns = (STOCK, *settings.drafts)
    for draft in columns:
        heading = {STOCK: "transformers", PLAIN: "plain"}.get(draft, f"draft {draft}")
        table.add_column(heading, justify="right")
    table.add_column("best draft", justify="right")
    for size in settings.sizes:
        ratios = {
            draft: [plain / drafted for plain, drafted in zip(baseline, seconds[size, draft], strict=True)]
            for draft in columns
        }
        medians = {draft: statistics.median(values) for draft, values in ratios.items()}
        cells = [f"{medians[draft]:.2f} [{min(ratios[draft]):.2f}, {max(ratios[draft]):.2f}]" for draft in ratios]
        table.add_row(str(size), *cells, str(max(medians, key=lambda draft: medians[draft])))
    console.print(table)


@torch.inference_mode()
def show_beginnings(name: str, settings: Settings, console: Console) -> None:
    """Print how much faster the prompts of a batch are read in one pass than one by one."""
    pair = load_pair(name)
    prompts = [list(prompt) for prompt in prompts_of(pair, name, settings.prompts)]
    requests = [TextRequest(AutoregressiveDecoder(pair), prompt, 1) for prompt in prompts]
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]

    def read(ids: list[list[int]], seen: list[list[int]]) -> object:
        model: Any = pair.target.model
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(seen), logits_to_keep=1)

    sides: list[Callable[[], object]] = [
        lambda: [Batch().begin([request]) for request in requests],
        lambda: Batch(len(requests)).begin(requests),
    ]
    if pair.target.source_limit is None:  # whose prompts a batch reads one by one: by the model itself
        sides = [lambda: [read([prompt], [[1] * len(prompt)]) for prompt in prompts], lambda: read(padded, mask)]
    ratios = []
    for turn in range(settings.turns + 1):
        times = [time.perf_counter()]
        for side in sides:
            side()
            times.append(time.perf_counter())
        if turn:  # the first warms up
            ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    console.print(
        f"{name}: {len(prompts)} prompts of {min(map(len, prompts))} to {longest} tokens in one pass "
        f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times"
    )


def show_memory(name: str, settings: Settings, console: Console) -> None:
    """Decode many short texts, eight at a time, and print the memory of the process on the way."""
    pair = load_pair(name)
    prompts = prompts_of(pair, name, settings.prompts)
    batch, begun, decoder = Batch(8), 0, SpeculativeDecoder(pair)
    lengths = np.random.default_rng(0).integers(4, settings.tokens, settings.endless).tolist()
    while begun < settings.endless or len(batch):
        while len(batch) < 8 and begun < settings.endless:
            batch.add(decoder, prompts[begun % len(prompts)], max_new_tokens=lengths[begun], seed=begun)
            begun += 1
            if begun % (settings.endless // 8) == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                console.print(f"{name}: {begun} texts, {peak:.0f} MiB at most")
        batch.step()


def show_steps(name: str, settings: Settings, console: Console) -> None:
    """Print the steps a second of live environments: one after another, in processes, and in one batch."""
    work, count = f"{name}/prose", settings.live
    profile = measured(load_pair(name))
    options: dict[str, Any] = {
        "workload": work,
        "profile": profile,
        "backend": "live",
        "max_new_tokens": settings.tokens,
    }

    def single(threads: int | None = None) -> gymnasium.Env[Any, Any]:
        if threads is not None:
            torch.set_num_threads(threads)
        return gymnasium.make("specgym/Thresholds-v0", disable_env_checker=True, **options)

    actions = np.random.default_rng(0).uniform(-1, 1, (64, count, 2)).astype(np.float32)
    together = gymnasium.make_vec("specgym/Thresholds-v0", num_envs=count, **options)
    together.reset(seed=0)
    apart = SubprocVecEnv([lambda: single(1)] * count)
    apart.reset()
    alone = [single() for _ in range(count)]
    for number, env in enumerate(alone):
        env.reset(seed=number)

    def one_after_another(step: int) -> None:
        for env, action in zip(alone, actions[step % 64], strict=True):
            env.step(action)

    sides: dict[str, Callable[[int], object]] = {
        "one after another": one_after_another,
        "in processes of one thread": lambda step: apart.step(actions[step % 64]),
        "in one batch": lambda step: together.step(actions[step % 64]),
    }
    rates = defaultdict[str, list[float]](list)
    for turn in range(settings.turns + 1):
        for side, step in sides.items():
            started = time.perf_counter()
            for number in range(8):
                step(8 * turn + number)
            if turn:
                rates[side].append(8 * count / (time.perf_counter() - started))
    apart.close()
    for side, values in rates.items():
        ratios = [value / first for value, first in zip(values, rates["one after another"], strict=True)]
        console.print(
            f"{name}, {count} live environments {side}: {statistics.median(values):.1f} steps/s, "
            f"{statistics.median(ratios):.2f} times"
        )


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    console = Console()
    show = show_memory if settings.endless else show_steps if settings.live else show_speeds
    show = show_beginnings if settings.beginnings else show
    for name in settings.pairs:
        show(name, settings, console)


if __name__ == "__main__":
    main()
