"""What predicted probabilities are worth: Brier score, calibration error, and what happened at each level of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..files import replacing

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Of predictions between 0 and 1, each with the outcome or the probability that it should have had.

    Attributes:
        brier: mean squared error, in [0, 1] (Brier, "Verification of forecasts expressed in terms of probability",
            1950).
        calibration_error: mean over predictions of the distance between mean prediction and mean outcome in their
            bin, in [0, 1] (Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", 2015).
        counts: predictions in each of ten bins of equal width.
        predicted: mean prediction of each bin; 0 for an empty one.
        happened: mean outcome of each bin; 0 for an empty one.
        accuracy: share of each bin that a threshold of one half puts on the right side; 0 for an empty one.
    """

    brier: float
    calibration_error: float
    counts: tuple[int, ...]
    predicted: tuple[float, ...]
    happened: tuple[float, ...]
    accuracy: tuple[float, ...]


def reliability(predictions: Tensor, outcomes: Tensor) -> Reliability:
    """Measure predictions.

    Args:
        predictions: in [0, 1], shape (n,), at least one.
        outcomes: in [0, 1], shape (n,).
    """
    given, seen = predictions.double(), outcomes.double()
    of = (given * BINS).long().clamp(0, BINS - 1)
    counts = torch.bincount(of, minlength=BINS)
    right = ((given >= 0.5) == (seen >= 0.5)).double()
    means = [torch.bincount(of, values, BINS) / counts.clamp(min=1) for values in (given, seen, right)]
    error = float((counts * (means[0] - means[1]).abs()).sum()) / len(given)
    predicted, happened, accuracy = (tuple(each.tolist()) for each in means)
    return Reliability(
        brier=float((given - seen).square().mean()),
        calibration_error=error,
        counts=tuple(counts.tolist()),
        predicted=predicted,
        happened=happened,
        accuracy=accuracy,
    )


def sharpened(log_probability: Tensor, temperature: float) -> Tensor:
    """What a draft's probabilities become at another temperature, if one of a node's candidates must be the right one.

    Args:
        log_probability: of the candidates at temperature 1, shape (n, children).
        temperature: above 0.

    Returns:
        Probabilities that add up to 1 in each row, same shape.
    """
    return (log_probability / temperature).softmax(-1)


def best_temperature(predictions_at: Callable[[float], Tensor], outcomes: Tensor) -> float:
    """The temperature between 0.05 and 20 whose predictions have the lowest negative log-likelihood, on a grid.

    Args:
        predictions_at: from a temperature to predictions in [0, 1], shape (n,).
        outcomes: in [0, 1], shape (n,).
    """
    grid = torch.logspace(-1.301, 1.301, 61).tolist()

    def loss(temperature: float) -> float:
        given = predictions_at(temperature).double().clamp(1e-12, 1 - 1e-12)
        return float(torch.nn.functional.binary_cross_entropy(given, outcomes.double()))

    return min(grid, key=loss)


def reliability_plot(path: Path, by_name: dict[str, Reliability]) -> None:
    """Draw how often what was predicted happened, as a PNG; a perfect forecast lies on the diagonal.

    Args:
        path: of the file, written whole or not at all.
        by_name: what to draw, by the name in the legend.
    """
    figure = Figure(figsize=(4.2, 4.0), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, one in by_name.items():
        filled = [number for number, count in enumerate(one.counts) if count]
        axes.plot([one.predicted[n] for n in filled], [one.happened[n] for n in filled], marker="o", label=name)
    axes.set(xlabel="predicted probability of acceptance", ylabel="share accepted", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
