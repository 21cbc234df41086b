"""Train a network that predicts which of a draft's candidates the target will accept.

Reports on acceptance predictors: Brier score, calibration error, reliability by level, depth and rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from ...decoders.draft_tree.alignment import AffineAlignment, DraftTreeModelError
from ...decoders.draft_tree.files import load_acceptance, load_alignment, save_acceptance, usual_alignment
from ...decoders.draft_tree.predictor import (
    AcceptancePredictor,
    Label,
    PredictorShape,
    calibrating_temperature,
    log_odds,
)
from ...errors import FitError, number
from ...files import replacing
from ...models.identity import weights_digest
from ...models.language_model import LanguageModel
from ...models.output_layer import output_layer
from ..cards import Facts, Rows, Section, show, size_of, training_lines, write_card
from ..loop import HeldOutLoss, Outcome, train_beside
from ..settings import LoopSettings, PairSettings, checked_option, small_network_loop
from ..text.prompts import JUDGING, TRAINING
from ..text.states import PairedStates
from .verifications import REPORTED, Verifications, open_pair, read_text, verifications

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


_MEANING = {
    "match": "the token is the target's likeliest, as greedy decoding demands",
    "probability": "the target's probability of the token, with which a verifier that samples accepts likeliest tokens",
    "ratio": "min(1, target / draft), with which a verifier accepts tokens drawn from the draft",
}


@dataclass(kw_only=True)
class AcceptanceSettings(PairSettings):
    """Train a network that predicts which of a draft's candidates the target will accept; both models stay as they are.

    The target continues prompts, both models read the text, and at every position the draft's candidates are verified.
    The network learns the result from the draft's aligned state, its probability and entropy, and the depth in the
    tree.
    """

    out: Path
    """Folder to write. Decoders find it by themselves if it is called <draft>-acceptance, beside the draft's folder."""
    alignment: str | None = None
    """Folder or name of the draft's alignment. Default: the one that decoders find by themselves."""
    label: Label = "match"
    """Meaning of acceptance. match: greedy decoding; probability: sampling, candidates are the likeliest; ratio:
    sampling, candidates are drawn."""
    label_temperature: float = 1.0
    """Temperature of the sampling, for the labels probability and ratio."""
    children: int = 5
    """Candidates at a position."""
    depth: int = 4
    """Depth of the deepest candidates in the trees."""
    width: int = 64
    """Width of the network's hidden layers."""
    aligned_scores: bool = True
    """Feed the network the probability from the target's output layer on the aligned state as well. A decoder then has
    to compute that, which is expensive if the vocabulary is large."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(
        default_factory=lambda: small_network_loop(tokens=512_000, batch=2, learning_rate=3e-3, bfloat16=False)
    )
    """Training; a step takes the candidates at --batch times --length nodes from anywhere in the trees."""


def make_acceptance(settings: AcceptanceSettings) -> AcceptanceReport:
    """Run the ``acceptance`` command.

    Raises:
        ModelNotFoundError, UnknownPairError: there are no such models.
        VocabularyMismatchError: the draft's tokens cannot be told in terms of the target's.
        DraftTreeModelError: there is no alignment, or it does not fit.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    checked_option(number, "label_temperature", settings.label_temperature, above=0)
    pair, draft = open_pair(settings, children=1, depth=1, width=1)
    if settings.children > pair.target.vocabulary_size:
        raise FitError(
            f"--children {settings.children} is more than the {pair.target.vocabulary_size} tokens there are"
        )
    alignment = _alignment(settings, draft, pair.target)
    paired = read_text(settings, pair, draft)
    target = paired.target
    data = verifications(
        paired.states,
        enough(paired.states, loop.tokens),
        alignment,
        output_layer(draft.model),
        output_layer(target.model),
        label=settings.label,
        children=settings.children,
        deepest=settings.depth,
        temperature=settings.label_temperature,
        seed=loop.seed,
    )
    predictor = _new(settings, alignment)
    facts = Facts(
        name=settings.out.name,
        summary=(
            f"A small network that predicts how likely {target.name} accepts a token that {draft.name} proposes, "
            f"before {target.name} has read it. It reads the state of {draft.name} mapped by its alignment."
        ),
        licence=settings.licence,
        sources=paired.sources,
        size=size_of(predictor),
    )

    def publish(outcome: Outcome, *sections: Section, more: tuple[str, ...] = ()) -> None:
        training = [
            f"label `{settings.label}`: {_MEANING[settings.label]}; {settings.children} candidates at every position, "
            "also as deeper nodes if the tokens between were accepted candidates",
            *training_lines(loop, outcome, "nodes", dtype=target.dtype),
            *more,
        ]
        card = write_card(facts, outcome, training, sections)
        save_acceptance(predictor, settings.out, draft, target, alignment, card=card)

    def loss_at(nodes: np.ndarray) -> Tensor:
        features, labels = data.examples(nodes)
        return functional.binary_cross_entropy_with_logits(predictor(features), labels)

    judging = data.of_side(JUDGING)
    asked = [settings.children, settings.label_temperature]
    key = [data.states.digest, weights_digest(alignment), asdict(predictor.shape), *asked]
    outcome, held_out = train_beside(predictor, loss_at, data, key, settings, publish)
    predictor.temperature.fill_(calibrating_temperature(*odds_of(predictor, data, judging)))
    publish(outcome)
    kept = load_acceptance(settings.out, draft, target, alignment)  # the report measures the network as written
    report = judge(kept, data, judging, data.of_side(REPORTED), held_out)
    curves = {"draft's probability": RAW, "among the candidates": SHARPENED, "predictor": CALIBRATED}
    reliability_plot(settings.out / PLOT, {name: report.scores[key] for name, key in curves.items()})
    verdict = f"{report.loss.verdict()} Before training it is the draft's own probability."
    calibrated = f"calibrated on the same texts: log-odds are divided by {report.temperature:.3f}"
    publish(outcome, report.section(), more=(verdict, calibrated))
    show(settings.out.name, *report.tables())
    return report


def enough(states: PairedStates, nodes: int) -> np.ndarray:
    """Positions to verify at: all that nothing is trained on, and as many others as training asks for.

    A position is at least one node. Texts are in a random order, and taken whole; shape (n,), int64, ascending.
    """
    side = states.text.side[states.row]
    trained = np.flatnonzero(side == TRAINING)
    last = states.row[trained[min(nodes, len(trained)) - 1]]
    return np.flatnonzero((side != TRAINING) | (states.row <= last))


def _alignment(settings: AcceptanceSettings, draft: LanguageModel, target: LanguageModel) -> AffineAlignment:
    if settings.alignment is not None:
        return load_alignment(settings.alignment, draft, target).requires_grad_(False)
    alignment = usual_alignment(draft, target)
    if alignment is None:
        raise DraftTreeModelError(
            f"there is no alignment for {draft.name}, which the predictor's states are mapped by; fit one: python -m "
            f"specgym.decoding.fit alignment --draft {draft.name} --target {target.name} --out {draft.name}-alignment, "
            "or give --alignment"
        )
    return alignment.requires_grad_(False)


def _new(settings: AcceptanceSettings, alignment: AffineAlignment) -> AcceptancePredictor:
    shape = PredictorShape(
        hidden_size=alignment.target_size,
        label=settings.label,
        deepest=settings.depth,
        width=settings.width,
        aligned_scores=settings.aligned_scores,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)
        return AcceptancePredictor(shape).to(alignment.weight.device)
