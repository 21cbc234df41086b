"""The training loop of all fit commands: mixed precision, schedule, checkpoints, resume, early stopping."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import FitError, TrainingError
from ..files import replacing
from .settings import LoopSettings, OwnTextSettings
from .text.corpus_text import Batches, PositionBatches
from .text.prompts import JUDGING, TRAINING

_MOST_JUDGED = 4096


@dataclass
class Outcome:
    """Totals of a training run.

    Attributes:
        steps: optimiser steps.
        tokens: tokens trained on.
        seconds: wall-clock time, over all parts of a resumed run.
        loss: mean training loss of the last steps, in nats a token.
    """

    steps: int
    tokens: int
    seconds: float
    loss: float


class HeldOutLoss(NamedTuple):
    """Loss on held-out text, in nats; infinite before it is measured.

    Attributes:
        before: before training.
        lowest: at its lowest, the start included.
    """

    before: float = math.inf
    lowest: float = math.inf

    @property
    def improved(self) -> bool:
        """True if training brought the loss below its value at the start."""
        return self.lowest < self.before

    def verdict(self) -> str:
        """A sentence on the effect of training."""
        if self.improved:
            return f"On held-out text the loss fell from {self.before:.3f} nats to {self.lowest:.3f} at best."
        return (
            f"Training improved nothing: on held-out text the loss was {self.before:.3f} nats before it and never "
            "lower after, so the weights are those of the start. Try a lower --learning-rate, or more --texts."
        )


class EarlyStopping:
    """Stop when a held-out loss no longer falls, and restore the best weights.

    Args:
        measure: measures the loss; must be deterministic, or a resumed run would differ.
        every: steps between two measurements.
        patience: measurements without progress before training ends; 0 never ends it.

    Attributes:
        loss: the held-out loss so far.
    """

    def __init__(self, measure: Callable[[], float], every: int, patience: int) -> None:
        self._measure, self.every, self._patience = measure, every, patience
        self.loss = HeldOutLoss()
        self._misses = 0
        self._weights: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        """True if training should end."""
        return 0 < self._patience <= self._misses

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Measure the loss before training, so that a run which only does harm returns its first weights."""
        self.check(weights)
        self.loss = HeldOutLoss(self.loss.lowest, self.loss.lowest)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Measure the loss, and copy the weights if it is the lowest so far."""
        value = self._measure()
        if value < self.loss.lowest:
            self.loss, self._misses = self.loss._replace(lowest=value), 0
            self._weights = {name: weight.detach().clone() for name, weight in weights.items()}
        else:
            self._misses += 1

    def take_best(self, weights: Mapping[str, Tensor]) -> None:
        """Measure once more, then restore the weights of the lowest loss, in place."""
        if not self.stopped:
            self.check(weights)
        with torch.no_grad():
            for name, value in self._weights.items():
                weights[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """The state for `restore`."""
        loss = {"first": self.loss.before, "best": self.loss.lowest}
        return {**loss, "misses": self._misses, "weights": self._weights}

    def restore(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Continue from a `state`, with tensors on the devices of those in ``like``."""
        self.loss, self._misses = HeldOutLoss(float(state["first"]), float(state["best"])), int(state["misses"])
        self._weights = {name: value.to(like[name].device) for name, value in state["weights"].items()}


@torch.no_grad()
def mean_loss(loss_at: Callable[[np.ndarray], Tensor], positions: np.ndarray, size: int = 512) -> float:
    """Mean over positions, shape (n,), at least one, of a loss that is computed at ``size`` positions at a time."""
    parts = np.array_split(positions, -(-len(positions) // size))
    return sum(len(part) * float(loss_at(part)) for part in parts) / len(positions)


def learning_rate(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at ``progress`` (0 to 1): linear rise, then a cosine down to 0.05."""
    if progress < warmup:
        return max(progress, 1e-3 * warmup) / warmup
    done = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))


def spread_over(positions: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of some numbers, evenly spread; shape (at most count,), int64."""
    return positions[np.linspace(0, len(positions) - 1, min(len(positions), count)).astype(np.int64)]


class Sided(Protocol):
    """Numbered positions in texts of several sides."""

    def of_side(self, side: int) -> np.ndarray:
        """Numbers of the positions in texts of one side, shape (m,), int64."""
        ...


def train_beside(
    network: nn.Module,
    loss_at: Callable[[np.ndarray], Tensor],
    data: Sided,
    key: Sequence[Any],
    settings: OwnTextSettings,
    publish: Callable[[Outcome], None],
) -> tuple[Outcome, HeldOutLoss]:
    """Train a small network beside a model, with early stopping.

    Args:
        network: the network; changed in place.
        loss_at: the mean loss at some positions.
        data: the positions.
        key: everything that the result depends on, besides the settings.
        settings: the settings of the command.
        publish: called after each periodic checkpoint.

    Raises:
        FitError: there are too few positions for a batch, or none to stop by.
        TrainingError: as for `train`.
    """
    judged, loop = spread_over(data.of_side(JUDGING), _MOST_JUDGED), settings.loop
    if not len(judged):
        raise FitError("the target ended every held-out text at once: give more --texts")
    stopping = EarlyStopping(lambda: mean_loss(loss_at, judged), settings.check_steps, settings.patience)
    words = json.dumps([*key, settings.check_steps, settings.patience])
    batches = PositionBatches(data.of_side(TRAINING), loop.batch * loop.length, loop.seed, words)
    outcome = train(
        network,
        lambda batch: loss_at(batch.numpy()),
        batches,
        loop,
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publish,
        stopping=stopping,
    )
    return outcome, stopping.loss


Rates = Callable[[str], float]
"""Learning rate of a parameter as a multiple of the common one, by its name."""


def _optimisers(model: nn.Module, settings: LoopSettings, rates: Rates | None) -> list[torch.optim.Optimizer]:
    """Optimisers whose parameter groups carry their multiple of the learning rate as ``share``."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is not None:
        embeddings.add(id(head.weight))
    by_rate: dict[float, dict[str, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        share = 1.0 if rates is None else rates(name)
        kinds = by_rate.setdefault(share, {"matrices": [], "rest": [], "hidden": []})
        matrix = "matrices" if id(parameter) in embeddings or settings.optimiser == "adamw" else "hidden"
        if parameter.requires_grad:
            kinds[matrix if parameter.ndim == 2 else "rest"].append(parameter)
    optimisers: list[torch.optim.Optimizer] = []
    rate, decay = settings.learning_rate, settings.weight_decay
    for share, kinds in by_rate.items():
        groups = [
            {"params": kinds[kind], "weight_decay": weight, "share": share}
            for kind, weight in (("matrices", decay), ("rest", 0.0))
            if kinds[kind]
        ]
        if groups:
            optimisers.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True))
        if kinds["hidden"]:
            # "match_rms_adamw" scales the steps so that one learning rate serves both.
            muon = [{"params": kinds["hidden"], "share": share}]
            optimisers.append(torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimisers


def _fingerprint(settings: LoopSettings, batches: Batches, model: nn.Module, ends_at: float) -> str:
    """Hash of everything that changes the result; a state is resumed only if it agrees."""
    chosen = asdict(settings)
    for name in ("threads", "device", "checkpoint_minutes", "work"):
        del chosen[name]
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    part = [ends_at] if ends_at < 1 else []
    text = json.dumps([chosen, shapes, batches.digest(), *part])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_state(state: Path, fingerprint: str | None = None) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{state} is damaged ({error}): remove it to begin again") from error
    if fingerprint is not None and saved["fingerprint"] != fingerprint:
        raise TrainingError(f"{state} belongs to a run with other settings or text: remove it, or give --work")
    return saved


@contextlib.contextmanager
def _dropout_seeded(device: torch.device, seed: int, step: int) -> Iterator[None]:
    """Draw what dropout drops by the step alone, so that a resumed run drops what one that was never stopped does."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]) >> 1)
        yield


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    batches: Batches,
    settings: LoopSettings,
    state: Path,
    on_checkpoint: Callable[[Outcome], None] | None = None,
    stop_after: int | None = None,
    stopping: EarlyStopping | None = None,
    rates: Rates | None = None,
    before_step: Callable[[float], None] | None = None,
    ends_at: float = 1.0,
    begun: Path | None = None,
) -> Outcome:
    """Train the parameters of a model that require a gradient, resuming from ``state`` if that file exists.

    Args:
        model: the model; changed in place.
        loss_of: computes the loss of a batch, for text the mean in nats a token. The batch is on the CPU, for text
            int64 of shape (batch, length + 1); the function moves to the device what the model reads.
        batches: what to train on, ``batch * length`` tokens a step.
        settings: how to train.
        state: file of the run's state; it stays after the end, so that a finished run is not repeated.
        on_checkpoint: called after each periodic checkpoint.
        stop_after: leave after this many steps of this call, with a checkpoint, like a killed run (for tests).
        stopping: may end the run early; at the end the model has the weights of the lowest held-out loss.
        rates: multiples of the learning rate; 1 for all parameters by default.
        before_step: called before each step with the progress of the run, from 0 to 1.
        ends_at: progress at which this part of the run ends; the schedule is that of the whole run.
        begun: state of the part before, from which this one goes on where ``state`` is not there yet.

    Raises:
        TrainingError: if the loss is not finite, or ``state`` belongs to another run.
    """
    settings.set_threads()
    per_step = settings.batch * settings.length
    total = max(1, math.ceil(settings.tokens / per_step))
    optimisers = _optimisers(model, settings, rates)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    device = next(model.parameters()).device
    fingerprint = _fingerprint(settings, batches, model, ends_at)
    outcome, earlier, average = Outcome(0, 0, 0.0, float("nan")), 0.0, float("nan")
    if state.is_file() or begun is not None:
        saved = _read_state(state, fingerprint) if begun is None or state.is_file() else _read_state(begun)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved["weights"][name])
        for optimiser, memory in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(memory)
        outcome = Outcome(**saved["outcome"])
        earlier, average = outcome.seconds, outcome.loss
        if stopping is not None:
            stopping.restore(saved["stopping"], trained)
    elif stopping is not None:
        stopping.begin(trained)

    def save() -> None:
        with replacing(state) as temporary:
            torch.save(
                {
                    "fingerprint": fingerprint,
                    "weights": {name: parameter.detach() for name, parameter in trained.items()},
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    "outcome": asdict(outcome),
                    **({} if stopping is None else {"stopping": stopping.state()}),
                },
                temporary,
            )

    def progress() -> float:
        share = outcome.steps / total
        return share if settings.minutes is None else max(share, outcome.seconds / (60 * settings.minutes))

    def ended() -> bool:
        return progress() >= ends_at or (stopping is not None and stopping.stopped)

    started = last_saved = time.monotonic()
    first = outcome.steps
    model.train()
    bar = tqdm(total=total, initial=first, unit="step", mininterval=5.0, desc=state.stem)
    while not ended() and (stop_after is None or outcome.steps - first < stop_after):
        rate = settings.learning_rate * learning_rate(progress(), settings.warmup)
        if before_step is not None:
            before_step(progress())
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * group["share"]
            optimiser.zero_grad(set_to_none=True)
        precision = torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16)
        with precision, _dropout_seeded(device, settings.seed, outcome.steps):
            loss = loss_of(batches(outcome.steps))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {outcome.steps}: use a lower --learning-rate or a longer --warmup "
                f"(and remove {state} to begin again)"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), settings.clip)
        for optimiser in optimisers:
            optimiser.step()
        average = value if math.isnan(average) else 0.98 * average + 0.02 * value
        now = time.monotonic()
        outcome = Outcome(outcome.steps + 1, (outcome.steps + 1) * per_step, earlier + now - started, average)
        bar.update()
        bar.set_postfix(loss=f"{average:.3f}", rate=f"{rate:.1e}", refresh=False)
        if stopping is not None and outcome.steps % stopping.every == 0:
            stopping.check(trained)
        if now - last_saved >= 60 * settings.checkpoint_minutes:
            save()
            if on_checkpoint is not None:
                on_checkpoint(outcome)
                model.train()
            last_saved = time.monotonic()
    bar.close()
    if stopping is not None and ended():
        stopping.take_best(trained)
    save()
    model.eval()
    return outcome
