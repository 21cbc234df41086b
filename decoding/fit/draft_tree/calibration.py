"""Reports on acceptance predictors: Brier score, calibration error, reliability by level, depth and rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from ...decoders.draft_tree.predictor import AcceptancePredictor, calibrating_temperature, log_odds
from ...files import replacing
from ..cards import Rows, Section
from ..loop import HeldOutLoss
from .verifications import Verifications

RAW, SCALED, SHARPENED = "draft's probability", "its log-odds calibrated", "among the candidates, calibrated"
PLAIN, CALIBRATED = "predictor", "predictor, calibrated"
PLOT = "reliability.png"
BINS = 10
_NODES_AT_A_TIME = 4096


@dataclass(frozen=True)
class Reliability:
    """Worth of predictions between 0 and 1, each with the outcome or the probability that it should have had.

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
    """Measure predictions, in [0, 1], shape (n,), at least one, against outcomes, likewise."""
    forecast, seen = predictions.double(), outcomes.double()
    bin_of = (forecast * BINS).long().clamp(0, BINS - 1)
    counts = torch.bincount(bin_of, minlength=BINS)
    right = ((forecast >= 0.5) == (seen >= 0.5)).double()
    means = [torch.bincount(bin_of, values, BINS) / counts.clamp(min=1) for values in (forecast, seen, right)]
    error = float((counts * (means[0] - means[1]).abs()).sum()) / len(forecast)
    predicted, happened, accuracy = (tuple(mean.tolist()) for mean in means)
    brier = float((forecast - seen).square().mean())
    return Reliability(brier, error, tuple(counts.tolist()), predicted, happened, accuracy)


def sharpened(log_probability: Tensor, temperature: float) -> Tensor:
    """A draft's probabilities at another temperature, renormalised over the candidates of each node.

    From log-probabilities at temperature 1, shape (n, children), to probabilities that add up to 1 in each row.
    """
    return (log_probability / temperature).softmax(-1)


def best_temperature(predictions_at: Callable[[float], Tensor], outcomes: Tensor) -> float:
    """The temperature between 0.05 and 20 whose predictions have the lowest negative log-likelihood, on a grid.

    Predictions and outcomes are in [0, 1], shape (n,).
    """
    grid = torch.logspace(-1.301, 1.301, 61).tolist()

    def loss(temperature: float) -> float:
        predictions = predictions_at(temperature).double().clamp(1e-12, 1 - 1e-12)
        return float(functional.binary_cross_entropy(predictions, outcomes.double()))

    return min(grid, key=loss)


@dataclass(frozen=True)
class AcceptanceReport:
    """Measurements of a finished predictor, on text that nothing was chosen by.

    Attributes:
        scores: reliability by name: `RAW`, `SCALED` and `SHARPENED`, which know the draft alone, `PLAIN` and
            `CALIBRATED`.
        by_depth: reliability of the calibrated predictor for the candidates at each depth.
        by_rank: the same for each place among a node's candidates.
        base_rate: mean label.
        candidates: number of candidates judged.
        temperature: temperature of the calibration.
        loss: loss on the texts that weights were chosen by, in nats a candidate.
    """

    scores: Mapping[str, Reliability]
    by_depth: Mapping[int, Reliability]
    by_rank: Mapping[int, Reliability]
    base_rate: float
    candidates: int
    temperature: float
    loss: HeldOutLoss

    def tables(self) -> tuple[Rows, Rows, Rows]:
        """Tables of all forecasts, by predicted probability, and by depth and rank; heading first."""
        forecasts = [["forecast", "Brier score", "calibration error"]]
        forecasts.append(["always the base rate", f"{self.base_rate * (1 - self.base_rate):.4f}", "0.0000"])
        for name, score in self.scores.items():
            forecasts.append([name, f"{score.brier:.4f}", f"{score.calibration_error:.4f}"])
        score = self.scores[CALIBRATED]
        levels = [["predicted", "candidates", "mean prediction", "accepted", "right at 0.5, %"]]
        for place, cells in enumerate(zip(score.counts, score.predicted, score.happened, score.accuracy, strict=True)):
            if cells[0]:
                levels.append([f"{place / BINS:.1f} to {(place + 1) / BINS:.1f}", *_cells(*cells)])
        parts = [["candidates", "count", "mean prediction", "accepted", "right at 0.5, %", "Brier score"]]
        named = [(f"at depth {depth}", score) for depth, score in self.by_depth.items()]
        named += [(f"of rank {rank}", score) for rank, score in self.by_rank.items()]
        for name, score in named:
            total, columns = sum(score.counts), (score.predicted, score.happened, score.accuracy)
            means = (np.dot(score.counts, values) / total for values in columns)
            parts.append([name, *_cells(total, *means), f"{score.brier:.4f}"])
        return forecasts, levels, parts

    def section(self) -> Section:
        """A section of the card."""
        intro = (
            f"{self.candidates:,} candidates in texts that nothing was chosen by; rivals that know the draft's "
            "probabilities alone have temperatures of their own, chosen as the predictor's (among the candidates: the "
            "draft's distribution at that temperature over the candidates of a node alone):"
        )
        return Section("Held-out text", [intro, *self.tables(), f"![Reliability]({PLOT})"])


def _cells(count: int, predicted: float, happened: float, accuracy: float) -> list[str]:
    return [f"{count:,}", f"{predicted:.3f}", f"{happened:.3f}", f"{100 * accuracy:.1f}"]


@torch.inference_mode()
def odds_of(predictor: AcceptancePredictor, data: Verifications, nodes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Log-odds before calibration, and labels, of all candidates of some nodes, at least one; shape (m * children,)."""
    parts = [data.examples(part) for part in np.array_split(nodes, -(-len(nodes) // _NODES_AT_A_TIME))]
    odds = torch.cat([predictor(features).cpu() for features, _ in parts])
    return odds, torch.cat([labels.cpu() for _, labels in parts])


def judge(
    predictor: AcceptancePredictor, data: Verifications, judging: np.ndarray, reported: np.ndarray, loss: HeldOutLoss
) -> AcceptanceReport:
    """Measure a calibrated predictor.

    Args:
        predictor: to be measured.
        data: the verifications.
        judging: numbers of the nodes that temperatures are chosen by, shape (m,), int64.
        reported: numbers of the nodes to judge at, shape (n,), int64.
        loss: loss on held-out text.
    """
    children = data.tokens.shape[1]

    def log_probability(nodes: np.ndarray) -> Tensor:
        return data.log_probability[torch.from_numpy(data.position[nodes])]

    def labels(nodes: np.ndarray) -> Tensor:
        return data.labels[torch.from_numpy(data.position[nodes])].flatten()

    earlier, outcomes = labels(judging), labels(reported)
    log_q = log_probability(reported)
    scale = calibrating_temperature(log_odds(log_probability(judging).flatten()), earlier)
    best = best_temperature(lambda value: sharpened(log_probability(judging), value).flatten(), earlier)
    odds, _ = odds_of(predictor, data, reported)
    predicted = torch.sigmoid(odds / predictor.temperature.cpu())
    forecasts = {
        RAW: log_q.exp().flatten(),
        SCALED: torch.sigmoid(log_odds(log_q.flatten()) / scale),
        SHARPENED: sharpened(log_q, best).flatten(),
        PLAIN: torch.sigmoid(odds),
        CALIBRATED: predicted,
    }
    depths = torch.from_numpy(data.depth[reported]).repeat_interleave(children)
    ranks = torch.arange(children).repeat(len(reported))
    return AcceptanceReport(
        scores={name: reliability(forecast, outcomes) for name, forecast in forecasts.items()},
        by_depth={int(d): reliability(predicted[depths == d], outcomes[depths == d]) for d in depths.unique()},
        by_rank={r + 1: reliability(predicted[ranks == r], outcomes[ranks == r]) for r in range(children)},
        base_rate=float(outcomes.mean()),
        candidates=len(outcomes),
        temperature=float(predictor.temperature),
        loss=loss,
    )


def reliability_plot(path: Path, by_name: dict[str, Reliability]) -> None:
    """Plot the share that happened over the predicted probability, as a PNG; the diagonal is a perfect forecast."""
    figure = Figure(figsize=(4.2, 4.0), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, score in by_name.items():
        filled = [number for number, count in enumerate(score.counts) if count]
        axes.plot([score.predicted[n] for n in filled], [score.happened[n] for n in filled], marker="o", label=name)
    axes.set(xlabel="predicted probability of acceptance", ylabel="share accepted", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
