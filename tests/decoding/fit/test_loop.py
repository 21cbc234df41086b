"""Early stopping, and batches that stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from specgym.decoding.fit.loop import EarlyStopping, Outcome, train
from specgym.decoding.fit.settings import LoopSettings


class Numbers:
    """The numbers 0 to 3, every step."""

    def __call__(self, step: int) -> torch.Tensor:
        return torch.arange(4)

    def digest(self) -> str:
        return "0" * 64


def run(
    folder: Path, aim: float, held_out_aim: float, steps: int = 6, stop_after: int | None = None, patience: int = 0
) -> tuple[float, EarlyStopping, Outcome]:
    """Bring a weight from 1 towards ``aim`` while its distance to another number is watched."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    stopping = EarlyStopping(lambda: abs(float(model.weight.detach()) - held_out_aim), 1, patience)
    settings = LoopSettings(
        tokens=4 * steps, batch=4, length=1, learning_rate=0.1, optimiser="adamw", weight_decay=0.0, warmup=0.0,
        bfloat16=False, device="cpu",
    )  # fmt: skip
    outcome = train(
        model,
        lambda _: (model.weight - aim).square().sum(),
        Numbers(),
        settings,
        folder / "state.pt",
        stopping=stopping,
        stop_after=stop_after,
    )
    return float(model.weight.detach()), stopping, outcome


def test_early_stopping_goes_back_to_the_best_and_counts_misses() -> None:
    losses = iter([3.0, 1.0, 2.0, 2.0])
    watch, weights = EarlyStopping(lambda: next(losses), 1, 2), {"w": torch.zeros(1)}
    for value in range(4):
        assert not watch.stopped
        weights["w"].fill_(value)
        watch.check(weights)
    assert watch.stopped
    other = EarlyStopping(lambda: 0.0, 1, 2)
    other.restore(watch.state(), weights)
    assert other.stopped
    other.take_best(weights)
    assert weights["w"].item() == 1
    assert other.loss.lowest == 1.0


def test_training_that_only_makes_things_worse_gives_back_what_it_began_with(tmp_path: Path) -> None:
    weight, stopping, _ = run(tmp_path, aim=5.0, held_out_aim=0.0)
    assert weight == 1
    assert stopping.loss.lowest == stopping.loss.before == 1
    assert not stopping.loss.improved


def test_training_that_helps_says_so(tmp_path: Path) -> None:
    weight, stopping, _ = run(tmp_path, aim=5.0, held_out_aim=5.0)
    assert weight > 1.2
    assert stopping.loss.before == 4
    assert stopping.loss.improved


@pytest.mark.parametrize("held_out_aim", [0.0, 5.0])
def test_a_resumed_run_knows_where_it_began(tmp_path: Path, held_out_aim: float) -> None:
    whole = run(tmp_path / "whole", 5.0, held_out_aim, patience=5)
    for stop in (0, 2, 3):
        run(tmp_path / "parts", 5.0, held_out_aim, stop_after=stop, patience=5)
    resumed = run(tmp_path / "parts", 5.0, held_out_aim, patience=5)
    assert resumed[0] == whole[0]
    assert resumed[1].state() == whole[1].state()
    assert resumed[2].steps == whole[2].steps


def test_batches_are_given_to_the_loss_as_they_are(tmp_path: Path) -> None:
    class Still(torch.Tensor):
        def to(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("what only says which rows to take was moved")

    class Places(Numbers):
        def __call__(self, step: int) -> torch.Tensor:
            return torch.arange(4).as_subclass(Still)

    model = nn.Linear(1, 1, bias=False)
    settings = LoopSettings(tokens=4, batch=4, length=1, optimiser="adamw", bfloat16=False, device="cpu")
    outcome = train(model, lambda _: model.weight.square().sum(), Places(), settings, tmp_path / "state.pt")
    assert outcome.steps == 1
