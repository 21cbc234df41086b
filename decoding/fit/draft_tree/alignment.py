"""Fit the affine map from a draft's hidden states to its target's, in closed form and then by gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ...decoders.draft_tree.alignment import AffineAlignment, RidgeFit, proposals
from ...decoders.draft_tree.files import load_alignment, save_alignment
from ...errors import number
from ...models.identity import weights_digest
from ...models.output_layer import OutputLayer, output_layer
from ..cards import Facts, Rows, Section, device_words, show, size_of, training_lines, write_card
from ..loop import Outcome, mean_loss, spread_over, train_beside
from ..settings import LoopSettings, PairSettings, checked_option, small_network_loop
from ..text.prompts import JUDGING, TRAINING
from ..text.states import PairedStates
from .verifications import REPORTED, drafted_scores, open_pair, read_text

DRAFT, LEAST_SQUARES, KEPT, MIXED = "the draft itself", "least squares", "this alignment", "half draft, half aligned"
_FIRST = 5
_LOGITS_AT_A_TIME = 2**22


@dataclass(kw_only=True)
class AlignmentSettings(PairSettings):
    """Fit the affine map from a draft's hidden states to its target's; both models stay as they are.

    The target continues prompts, and both models read the text. Least squares give the map whose states are closest;
    from there (or from no map at all, if that is better) training lowers the KL divergence from the target's
    distribution to that of its output layer on the mapped states.
    """

    out: Path
    """Folder to write. Decoders find it by themselves if it is called <draft>-alignment, beside the draft's folder."""
    gradient: bool = True
    """Train after least squares."""
    penalty: float = 1e-3
    """Penalty on weights in least squares, as a multiple of the mean variance of the draft's features."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(
        default_factory=lambda: small_network_loop(tokens=512_000, batch=2, learning_rate=1e-3, bfloat16=False)
    )
    """Training; a step takes --batch times --length positions from anywhere in the text."""


def make_alignment(settings: AlignmentSettings) -> AlignmentReport:
    """Run the ``alignment`` command.

    Raises:
        ModelNotFoundError, UnknownPairError: there are no such models.
        VocabularyMismatchError: the draft's tokens cannot be told in terms of the target's.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        DraftTreeModelError: there is too little text to determine the map.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    checked_option(number, "penalty", settings.penalty, at_least=0)
    pair, draft = open_pair(settings)
    paired = read_text(settings, pair, draft)
    target, states = paired.target, paired.states
    outputs = output_layer(draft.model), output_layer(target.model)
    ridge = least_squares(states, states.of_side(TRAINING), settings.penalty).to(target.device)
    alignment = ridge if not settings.gradient else _start(ridge, states, outputs[1])
    facts = Facts(
        name=settings.out.name,
        summary=(
            f"An affine map from the hidden states of {draft.name} (width {alignment.draft_size}) to those of "
            f"{target.name} (width {alignment.target_size}), both after their final norm. The output layer of "
            f"{target.name} on a mapped state guesses the next token of {target.name}."
        ),
        licence=settings.licence,
        sources=paired.sources,
        size=size_of(alignment),
    )

    def publish(outcome: Outcome | None, *sections: Section) -> None:
        lines = [f"least squares in closed form, on {device_words(loop, target.dtype)}"]
        if outcome is not None:
            lines = [
                "least squares in closed form, then training from there or, if the states have one width and that "
                "diverged less, from no map at all",
                f"loss: the KL divergence from {target.name} to its output layer on mapped states",
                *training_lines(loop, outcome, "positions", dtype=target.dtype),
            ]
        card = write_card(facts, outcome, lines, sections)
        save_alignment(alignment, settings.out, draft, target, card=card)

    outcome = None
    if settings.gradient:
        outcome, _ = train_beside(
            alignment,
            lambda positions: divergence(alignment, states, positions, outputs[1]),
            states,
            [states.digest, weights_digest(alignment)],
            settings,
            publish,
        )
    publish(outcome)
    kept = load_alignment(settings.out, draft, target)  # the report measures the map as written
    report = judge(states, states.of_side(REPORTED), *outputs, ridge, kept)
    note = (
        f"All of it is text that {target.name} wrote at temperature {settings.own_text.temperature:g}. On other text, "
        "such as prompts or its text at a higher temperature, the draft itself may agree more."
    )
    publish(outcome, report.section(note))
    show(settings.out.name, report.table(), report.domain_table())
    return report


def least_squares(states: PairedStates, positions: np.ndarray, penalty: float) -> AffineAlignment:
    """The map whose states are closest to the target's at some positions, shape (n,); see `RidgeFit.solve`.

    Raises:
        DraftTreeModelError: there are too few positions to determine it.
    """
    fit = RidgeFit(states.draft.shape[1], states.target.shape[1])
    parts = np.array_split(positions, -(-len(positions) // 4096))
    for part in tqdm(parts, unit="batch", mininterval=5.0, desc="least squares"):
        fit.add(states.of_draft(part), states.of_target(part))
    return fit.solve(penalty)


def divergence(alignment: AffineAlignment, states: PairedStates, positions: np.ndarray, output: OutputLayer) -> Tensor:
    """Mean KL divergence, in nats, from the target's distribution to that of its output layer on mapped states."""
    device = alignment.weight.device
    with torch.no_grad():
        expected = proposals(states.of_target(positions).to(device), output).log_softmax(-1)
    mapped = proposals(alignment(states.of_draft(positions).to(device)), output).log_softmax(-1)
    return functional.kl_div(mapped, expected, log_target=True, reduction="batchmean")


def _held_out(alignment: AffineAlignment, states: PairedStates, output: OutputLayer) -> float:
    positions = spread_over(states.of_side(JUDGING), 4096)
    return mean_loss(lambda part: divergence(alignment, states, part, output), positions)


def _start(ridge: AffineAlignment, states: PairedStates, output: OutputLayer) -> AffineAlignment:
    """The start of training: least squares, or no map at all if both widths are equal and that diverges less.

    A draft that consists of its target's layers and has its output layer shares its space already.
    """
    if ridge.draft_size == ridge.target_size:
        none = AffineAlignment(ridge.draft_size, ridge.target_size).to(ridge.weight.device)
        if _held_out(none, states, output) < _held_out(ridge, states, output):
            return none
    return copy.deepcopy(ridge)


@dataclass(frozen=True)
class Agreement:
    """Agreement of a guess with the target, as means over positions.

    Attributes:
        match: share at which the likeliest token of the guess is the target's likeliest, in [0, 1].
        first: share at which that is among the first five of the guess, in [0, 1].
        divergence: KL divergence from the target's distribution to the guess, in nats.
    """

    match: float
    first: float
    divergence: float


Guess = Callable[[Tensor], Tensor]
"""Logits, shape (n, vocabulary), from a draft's states, shape (n, draft width)."""


@torch.inference_mode()
def agreement(guess: Guess, states: PairedStates, positions: np.ndarray, output: OutputLayer) -> Agreement:
    """Compare guesses with the target's distribution at some positions, shape (m,), at least one."""
    device = output.weight.device
    match = first = divergence = 0.0
    step = max(1, _LOGITS_AT_A_TIME // len(output.weight))
    for start in range(0, len(positions), step):
        part = positions[start : start + step]
        expected = proposals(states.of_target(part).to(device), output).log_softmax(-1)
        guessed = guess(states.of_draft(part).to(device)).log_softmax(-1)
        hits = guessed.topk(min(_FIRST, guessed.shape[-1]), dim=-1).indices == expected.argmax(-1, keepdim=True)
        match, first = match + float(hits[:, 0].sum()), first + float(hits.sum())
        divergence += float(functional.kl_div(guessed, expected, log_target=True, reduction="sum"))
    count = len(positions)
    return Agreement(match / count, first / count, divergence / count)


@torch.inference_mode()
def r_squared(alignment: AffineAlignment, states: PairedStates, positions: np.ndarray) -> float:
    """Share of the variance of the target's states, over all their features together, that mapped states explain."""
    left, total, squares = 0.0, torch.zeros(alignment.target_size, dtype=torch.float64), 0.0
    for part in np.array_split(positions, -(-len(positions) // 4096)):
        expected = states.of_target(part).double()
        mapped = alignment(states.of_draft(part).to(alignment.weight.device)).cpu().double()
        left += float((expected - mapped).square().sum())
        total, squares = total + expected.sum(0), squares + float(expected.square().sum())
    return 1 - left / max(squares - float(total.square().sum()) / len(positions), 1e-30)


@dataclass(frozen=True)
class AlignmentReport:
    """Measurements of a finished alignment, on text that nothing was chosen by.

    Attributes:
        agreements: agreement of guesses with the target: `DRAFT`, `LEAST_SQUARES`, `KEPT`, `MIXED`.
        r_squared: explained share of the variance of the target's states, for the two maps.
        by_domain: agreement of the draft and of the alignment in each domain.
        positions: number of positions judged.
    """

    agreements: Mapping[str, Agreement]
    r_squared: Mapping[str, float]
    by_domain: Mapping[str, tuple[Agreement, Agreement]]
    positions: int

    def table(self) -> Rows:
        """A table of all guesses, heading first."""
        rows = [["guess", "R^2", "agreement, %", f"in the first {_FIRST}, %", "KL divergence, nats"]]
        for name, guess in self.agreements.items():
            explained = f"{self.r_squared[name]:.3f}" if name in self.r_squared else "-"
            shares = (f"{100 * share:.1f}" for share in (guess.match, guess.first))
            rows.append([name, explained, *shares, f"{guess.divergence:.3f}"])
        return rows

    def domain_table(self) -> Rows:
        """A table by domain, heading first."""
        rows = [["domain", "agreement of the draft, %", "of the alignment, %"]]
        for domain, guesses in self.by_domain.items():
            rows.append([domain, *(f"{100 * guess.match:.1f}" for guess in guesses)])
        return rows

    def section(self, note: str) -> Section:
        """A section of the card, with a note at its end."""
        intro = (
            f"At {self.positions:,} positions of texts that nothing was chosen by, how often the likeliest token of a "
            "guess, computed from the draft's state, is the target's likeliest:"
        )
        return Section("Held-out text", [intro, self.table(), self.domain_table(), note])


def judge(
    states: PairedStates,
    positions: np.ndarray,
    draft_output: OutputLayer,
    target_output: OutputLayer,
    ridge: AffineAlignment,
    kept: AffineAlignment,
) -> AlignmentReport:
    """Measure an alignment beside the map of least squares, at some positions, shape (n,), int64."""

    def drafted(hidden: Tensor) -> Tensor:
        return drafted_scores(hidden, draft_output, target_output)

    def mapped(alignment: AffineAlignment, hidden: Tensor) -> Tensor:
        return proposals(alignment(hidden), target_output)

    def mixed(hidden: Tensor) -> Tensor:
        return (drafted(hidden).softmax(-1) + mapped(kept, hidden).softmax(-1)).log()

    def agree(guess: Guess, chosen: np.ndarray) -> Agreement:
        return agreement(guess, states, chosen, target_output)

    guesses: dict[str, Guess] = {
        DRAFT: drafted,
        LEAST_SQUARES: partial(mapped, ridge),
        KEPT: partial(mapped, kept),
        MIXED: mixed,
    }
    domain = states.text.domain[states.row[positions]]
    members = {name: positions[domain == place] for place, name in enumerate(states.text.domains)}
    return AlignmentReport(
        agreements={name: agree(guess, positions) for name, guess in guesses.items()},
        r_squared={LEAST_SQUARES: r_squared(ridge, states, positions), KEPT: r_squared(kept, states, positions)},
        by_domain={
            name: (agree(guesses[DRAFT], part), agree(guesses[KEPT], part))
            for name, part in members.items()
            if len(part)
        },
        positions=len(positions),
    )
