"""The report on an acceptance predictor: what its probabilities are worth beside the draft's own; also as a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..decoders.draft_tree import AcceptancePredictor
from ..decoders.draft_tree.predictor import calibrating_temperature, log_odds
from .card import Facts, markdown, opening, precision, schedule, where
from .distilled_text import TextSettings, describe_text
from .early_stopping import verdict
from .loop import LoopSettings, Outcome
from .reliability import BINS, Reliability, best_temperature, reliability, sharpened
from .verifications import Verifications

RAW, SCALED, SHARPENED = "draft's probability", "its log-odds calibrated", "among the candidates, calibrated"
PLAIN, CALIBRATED = "predictor", "predictor, calibrated"
PLOT = "reliability.png"
_MEANING = {
    "match": "the token is the target's likeliest, as greedy decoding demands",
    "probability": "the target's own probability of the token, with which a verifier that samples accepts likeliest "
    "tokens",
    "ratio": "min(1, target / draft), with which a verifier accepts tokens drawn from the draft",
}
_NODES_AT_A_TIME = 4096


@dataclass(frozen=True)
class AcceptanceReport:
    """What was measured of a finished predictor, on text that nothing was chosen by.

    Attributes:
        scores: by name: `RAW`, `SCALED` and `SHARPENED`, which know the draft alone, `PLAIN` and `CALIBRATED`.
        by_depth: of the calibrated predictor, for the candidates at each depth.
        by_rank: of the calibrated predictor, for each place among a node's candidates.
        base_rate: mean label.
        candidates: how many were judged.
        temperature: of the calibration.
        loss_before: on the texts that weights were chosen by, before training, in nats a candidate.
        held_out_loss: the lowest there.
    """

    scores: Mapping[str, Reliability]
    by_depth: Mapping[int, Reliability]
    by_rank: Mapping[int, Reliability]
    base_rate: float
    candidates: int
    temperature: float
    loss_before: float
    held_out_loss: float

    def rows(self) -> list[list[str]]:
        """A table of all forecasts, its heading first."""
        found = [["forecast", "Brier score", "calibration error"]]
        found.append(["always the base rate", f"{self.base_rate * (1 - self.base_rate):.4f}", "0.0000"])
        for name, one in self.scores.items():
            found.append([name, f"{one.brier:.4f}", f"{one.calibration_error:.4f}"])
        return found

    def confidence_rows(self) -> list[list[str]]:
        """A table by predicted probability, its heading first."""
        one = self.scores[CALIBRATED]
        found = [["predicted", "candidates", "mean prediction", "accepted", "right at 0.5, %"]]
        for place, count in enumerate(one.counts):
            if count:
                found.append(
                    [
                        f"{place / BINS:.1f} to {(place + 1) / BINS:.1f}",
                        f"{count:,}",
                        f"{one.predicted[place]:.3f}",
                        f"{one.happened[place]:.3f}",
                        f"{100 * one.accuracy[place]:.1f}",
                    ]
                )
        return found

    def part_rows(self) -> list[list[str]]:
        """A table by depth and by rank, its heading first."""
        found = [["candidates", "count", "mean prediction", "accepted", "right at 0.5, %", "Brier score"]]
        named = [(f"at depth {depth}", one) for depth, one in self.by_depth.items()]
        named += [(f"of rank {rank}", one) for rank, one in self.by_rank.items()]
        for name, one in named:
            total = sum(one.counts)
            shares = [
                sum(count * value for count, value in zip(one.counts, values, strict=True)) / total
                for values in (one.predicted, one.happened, one.accuracy)
            ]
            found.append(
                [
                    name,
                    f"{total:,}",
                    f"{shares[0]:.3f}",
                    f"{shares[1]:.3f}",
                    f"{100 * shares[2]:.1f}",
                    f"{one.brier:.4f}",
                ]
            )
        return found

    def show(self, name: str) -> None:
        """Print the tables."""
        for heading, *rows in (self.rows(), self.confidence_rows(), self.part_rows()):
            table = Table(*heading, title=name, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for row in rows:
                table.add_row(*row)
            Console().print(table)


@torch.inference_mode()
def odds_of(predictor: AcceptancePredictor, found: Verifications, nodes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Log-odds before calibration, and labels, of all candidates of some nodes; each of shape (m * children,).

    Args:
        predictor: whose they are.
        found: the verifications.
        nodes: their numbers, shape (m,), int64, at least one.
    """
    parts = [found.examples(part) for part in np.array_split(nodes, -(-len(nodes) // _NODES_AT_A_TIME))]
    odds = torch.cat([predictor(features).cpu() for features, _ in parts])
    return odds, torch.cat([labels.cpu() for _, labels in parts])


def judge(
    predictor: AcceptancePredictor,
    found: Verifications,
    chosen_by: np.ndarray,
    reported: np.ndarray,
    losses: tuple[float, float],
) -> AcceptanceReport:
    """Measure a calibrated predictor.

    Args:
        predictor: to be measured.
        found: the verifications.
        chosen_by: numbers of the nodes that temperatures are chosen by, shape (m,), int64.
        reported: numbers of the nodes to judge at, shape (n,), int64.
        losses: before training, and the lowest.
    """
    children = found.tokens.shape[1]

    def own(nodes: np.ndarray) -> Tensor:
        return found.log_probability[torch.from_numpy(found.position[nodes])]

    def truth(nodes: np.ndarray) -> Tensor:
        return found.labels[torch.from_numpy(found.position[nodes])].flatten()

    earlier, outcomes = truth(chosen_by), truth(reported)
    scale = calibrating_temperature(log_odds(own(chosen_by).flatten()), earlier)
    best = best_temperature(lambda temperature: sharpened(own(chosen_by), temperature).flatten(), earlier)
    odds, _ = odds_of(predictor, found, reported)
    predicted = torch.sigmoid(odds / predictor.temperature.cpu())
    forecasts = {
        RAW: own(reported).exp().flatten(),
        SCALED: torch.sigmoid(log_odds(own(reported).flatten()) / scale),
        SHARPENED: sharpened(own(reported), best).flatten(),
        PLAIN: torch.sigmoid(odds),
        CALIBRATED: predicted,
    }
    depth = torch.from_numpy(found.depth[reported]).repeat_interleave(children)
    rank = torch.arange(children).repeat(len(reported))
    return AcceptanceReport(
        scores={name: reliability(forecast, outcomes) for name, forecast in forecasts.items()},
        by_depth={int(each): reliability(predicted[depth == each], outcomes[depth == each]) for each in depth.unique()},
        by_rank={each + 1: reliability(predicted[rank == each], outcomes[rank == each]) for each in range(children)},
        base_rate=float(outcomes.mean()),
        candidates=len(outcomes),
        temperature=float(predictor.temperature),
        loss_before=losses[0],
        held_out_loss=losses[1],
    )


def acceptance_card(
    facts: Facts,
    text: TextSettings,
    settings: LoopSettings,
    dtype: torch.dtype,
    label: str,
    children: int,
    outcome: Outcome,
    report: AcceptanceReport | None,
) -> str:
    """The text of a predictor's card.

    Args:
        facts: what it is and comes from.
        text: how the target's own text was made.
        settings: how it was trained.
        dtype: of the models.
        label: what it means to accept.
        children: candidates of a node.
        outcome: what training did.
        report: what was measured; None while training goes on.
    """
    assert facts.target is not None
    lines = opening(facts, outcome if report is None else None)
    lines += [
        f"- {describe_text(text, facts.target)}",
        *("", "## Training", ""),
        f"- label `{label}`: {_MEANING[label]}; {children} candidates at every position, also as deeper nodes where "
        "the tokens between were accepted candidates",
        f"- {outcome.tokens:,} nodes in {outcome.steps:,} steps of {settings.batch * settings.length}, "
        f"{outcome.seconds / 60:.0f} minutes on {where(settings, dtype)}",
        f"- AdamW, {schedule(settings)}",
        f"- {precision(settings)}, seed {settings.seed}",
    ]
    if report is not None:
        lines += [
            f"- {verdict(report.loss_before, report.held_out_loss)} Before training it is the draft's own probability.",
            f"- calibrated on the same texts: log-odds are divided by {report.temperature:.3f}",
            *("", "## Text kept apart", ""),
            f"{report.candidates:,} candidates in texts that nothing was chosen by; rivals that know the draft's "
            "probabilities alone have temperatures of their own, chosen as the predictor's (among the candidates: the "
            "draft's distribution at that temperature over the candidates of a node alone):",
        ]
        lines += ["", *_markdown(report.rows()), "", *_markdown(report.confidence_rows())]
        lines += ["", *_markdown(report.part_rows()), "", f"![Reliability]({PLOT})"]
    return "\n".join(lines) + "\n"


def _markdown(table: list[list[str]]) -> list[str]:
    heading, *rows = table
    return markdown(heading, rows)
