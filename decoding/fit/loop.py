"""The training loop that targets, drafts and heads share: mixed precision, schedule, progress, checkpoints, resume."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import replacing
from .early_stopping import EarlyStopping
from .errors import TrainingError


@dataclass
class LoopSettings:
    """How to train; shared by the commands that train."""

    tokens: int = 10_000_000
    """Tokens to train on; text is repeated when there is less."""
    minutes: float | None = None
    """Wall-clock budget; the learning rate then falls with whichever of tokens and minutes is further on. A run that
    this ends cannot be repeated exactly; one that ends by tokens can."""
    batch: int = 8
    """Windows in a batch."""
    length: int = 512
    """Tokens in a window."""
    learning_rate: float = 3e-3
    """Highest learning rate, reached after the warm-up."""
    optimiser: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices of the layers and AdamW for the rest; adamw: AdamW for everything."""
    warmup: float = 0.03
    """Share of the run in which the learning rate rises; then it follows a cosine down to a twentieth."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    bfloat16: bool = True
    """Multiply matrices in bfloat16; weights stay float32."""
    seed: int = 0
    """Seed of weights, document order and batches."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    device: str = "auto"
    """Where to train: auto (the first CUDA device if there is one), cpu, cuda, cuda:1, ..."""
    checkpoint_minutes: float = 3.0
    """Minutes between two checkpoints."""
    work: Path = Path("runs/fit")
    """Folder of the run's own state; a run that was killed goes on from there when the same command is given again."""


@dataclass
class Outcome:
    """What a training run did.

    Attributes:
        steps: optimiser steps.
        tokens: tokens trained on.
        seconds: wall-clock time, over all its parts if it was resumed.
        loss: mean training loss of the last steps, in nats a token.
    """

    steps: int
    tokens: int
    seconds: float
    loss: float


Rates = Callable[[str], float]
"""From a parameter's name to the multiple of the learning rate that it has."""


class Batches(Protocol):
    """What a run trains on; asking for a step needs no history, so that a resumed run equals one never stopped."""

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of one step."""
        ...

    def digest(self) -> str:
        """Of everything that the batches depend on besides the settings, 64 hex digits."""
        ...


def device_of(settings: LoopSettings) -> torch.device:
    """The device that the settings mean."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(progress: float, warmup: float) -> float:
    """Share of the highest learning rate at ``progress`` (0 to 1): linear rise, then a cosine down to 0.05."""
    if progress < warmup:
        return max(progress, 1e-3 * warmup) / warmup
    done = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))


def _optimisers(model: nn.Module, settings: LoopSettings, rates: Rates | None) -> list[torch.optim.Optimizer]:
    """Optimisers whose groups of parameters say by ``share`` which part of the learning rate is theirs."""
    by_rate: dict[float, list[str]] = {}
    for name, _ in model.named_parameters():
        by_rate.setdefault(1.0 if rates is None else rates(name), []).append(name)
    parameters = dict(model.named_parameters())
    found = [
        optimiser
        for share, names in by_rate.items()
        for optimiser in _optimisers_of(model, [parameters[name] for name in names], settings, share)
    ]
    return found


def _optimisers_of(
    model: nn.Module, parameters: Sequence[nn.Parameter], settings: LoopSettings, share: float
) -> list[torch.optim.Optimizer]:
    hidden, matrices, rest = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is not None:
        embeddings.add(id(head.weight))
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2:
            rest.append(parameter)
        elif id(parameter) in embeddings or settings.optimiser == "adamw":
            matrices.append(parameter)
        else:
            hidden.append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [
        {"params": part, "weight_decay": weight} for part, weight in ((matrices, decay), (rest, 0.0)) if part
    ]  # fmt: skip
    found: list[torch.optim.Optimizer] = []
    if groups:
        found.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True))
    if hidden:
        # "match_rms_adamw" scales the steps so that one learning rate serves both.
        found.append(torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    for optimiser in found:
        for group in optimiser.param_groups:
            group["share"] = share
    return found


def _fingerprint(settings: LoopSettings, batches: Batches, model: nn.Module) -> str:
    """What a state must agree on to be continued: everything that changes the result."""
    chosen = asdict(settings)
    for name in ("threads", "device", "checkpoint_minutes", "work"):
        del chosen[name]
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    text = json.dumps([chosen, shapes, batches.digest()])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_state(state: Path) -> dict[str, Any]:
    try:
        return torch.load(state, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{state} is damaged ({error}): remove it to begin again") from error


def train(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    batches: Batches,
    settings: LoopSettings,
    state: Path,
    on_checkpoint: Callable[[Outcome], None] | None = None,
    stop_after: int | None = None,
    stopping: EarlyStopping | None = None,
    rates: Rates | None = None,
    before_step: Callable[[float], None] | None = None,
) -> Outcome:
    """Train what requires a gradient in ``model``, going on from ``state`` if that file exists.

    Args:
        model: the model; changed in place.
        loss_of: from a batch, for text int64 (batch, length + 1), to the loss: for text its mean in nats a token. The
            batch is on the CPU; what of it the model reads is moved to the device here.
        batches: what to train on, ``batch * length`` tokens a step.
        settings: how to train.
        state: file of the run's state; stays after the end, so that a finished run is not repeated.
        on_checkpoint: called after each periodic checkpoint.
        stop_after: leave after so many steps of this call, with a checkpoint, as a kill would (for tests).
        stopping: may end the run early; at the end the model has the weights of the lowest held-out loss, which are
            those that it began with if nothing improved.
        rates: what multiple of the learning rate a parameter has, by its name; 1 for all by default.
        before_step: told before each step how far the run is, from 0 to 1.

    Raises:
        TrainingError: if the loss is not finite, or ``state`` belongs to another run.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    per_step = settings.batch * settings.length
    total = max(1, math.ceil(settings.tokens / per_step))
    optimisers = _optimisers(model, settings, rates)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    fingerprint = _fingerprint(settings, batches, model)
    outcome, earlier, average = Outcome(0, 0, 0.0, float("nan")), 0.0, float("nan")
    if state.is_file():
        saved = _read_state(state)
        if saved["fingerprint"] != fingerprint:
            raise TrainingError(f"{state} belongs to a run with other settings or text: remove it, or give --work")
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
                    "weights": {name: p.detach() for name, p in trained.items()},
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
        return progress() >= 1.0 or (stopping is not None and stopping.stopped)

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
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
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
