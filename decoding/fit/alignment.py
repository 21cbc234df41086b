"""Fit the affine map from a draft's hidden states to its target's, in closed form and then by gradient."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..decoders.draft_tree import AffineAlignment, RidgeFit, load_alignment, proposals, save_alignment
from ..models.output_head import OutputLayer, output_layer
from ..models.weight_hashes import weights_digest
from .alignment_report import AlignmentReport, alignment_card, judge
from .card import Facts
from .early_stopping import EarlyStopping
from .errors import FitError
from .loop import LoopSettings, Outcome, train
from .paired_states import PairedStates
from .paired_text import REPORTED, PairSettings, check_pair_settings, open_pair, pair_loop, read_text, spread_over
from .position_batches import PositionBatches
from .prompt_windows import JUDGING, TRAINING

_HELD_OUT_POSITIONS = 4096


@dataclass(kw_only=True)
class AlignmentSettings(PairSettings):
    """Fit the affine map from a draft's hidden states to its target's; both models stay as they are.

    The target continues prompts, and both models read what it wrote. Least squares give the map whose states are
    closest; from there (or from no map at all, where that is better) training lowers the KL divergence from the
    target's distribution to what its output layer says of the mapped states.
    """

    out: Path
    """Folder to write. Called <draft>-alignment beside the draft's own folder, decoders find it by themselves."""
    gradient: bool = True
    """Train; otherwise least squares are all there is."""
    penalty: float = 1e-3
    """Of the weights in least squares, as a multiple of the mean variance of the draft's features."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=lambda: pair_loop(1e-3))
    """How to train; a step takes --batch times --length positions of the text, wherever they are."""


def make_alignment(settings: AlignmentSettings) -> AlignmentReport:
    """Run the ``alignment`` command.

    Raises:
        ModelNotFoundError, UnknownPairError: there are no such models.
        VocabularyMismatchError: they do not number the same tokens.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        DraftTreeModelError: there is too little text to determine the map.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    check_pair_settings(settings, loop, settings.out, {})
    if not 0 <= settings.penalty < float("inf"):
        raise FitError(f"--penalty {settings.penalty} makes no sense: give 0 or more")
    pair, draft = open_pair(settings, loop)
    paired = read_text(settings, loop, pair, draft)
    target, states = paired.target, paired.states
    outputs = output_layer(draft.model), output_layer(target.model)
    ridge = least_squares(states, states.of_side(TRAINING), settings.penalty).to(target.device)
    alignment = ridge if not settings.gradient else _start(ridge, states, outputs[1])
    own = sum(parameter.numel() for parameter in alignment.parameters())
    facts = Facts(
        name=settings.out.name,
        summary=(
            f"An affine map from the hidden states of {draft.name} (width {alignment.draft_size}) to those of "
            f"{target.name} (width {alignment.target_size}), both after their final norm. The output layer of "
            f"{target.name} on a mapped state guesses what {target.name} will say next."
        ),
        parameters=own,
        stored=own,
        licence=settings.licence,
        sources=paired.sources,
        target=target.name,
    )

    def publish(outcome: Outcome | None, report: AlignmentReport | None = None) -> None:
        card = alignment_card(facts, settings.own_text, loop, target.dtype, outcome, report)
        save_alignment(alignment, settings.out, draft, target, card=card)

    outcome = _train(settings, alignment, states, outputs[1], publish) if settings.gradient else None
    publish(outcome)
    kept = load_alignment(settings.out, draft, target)  # so that what is measured is what was written
    report = judge(states, states.of_side(REPORTED), *outputs, ridge, kept)
    publish(outcome, report)
    report.show(settings.out.name)
    return report


def least_squares(states: PairedStates, positions: np.ndarray, penalty: float) -> AffineAlignment:
    """The map whose states are closest to the target's.

    Args:
        states: of draft and target.
        positions: numbers of those to learn from, shape (n,), int64.
        penalty: see `RidgeFit.solve`.

    Raises:
        DraftTreeModelError: there are too few to determine it.
    """
    fit = RidgeFit(states.draft.shape[1], states.target.shape[1])
    parts = np.array_split(positions, -(-len(positions) // 4096))
    for part in tqdm(parts, unit="batch", mininterval=5.0, desc="least squares"):
        fit.add(states.of_draft(part), states.of_target(part))
    return fit.solve(penalty)


def divergence(alignment: AffineAlignment, states: PairedStates, positions: np.ndarray, output: OutputLayer) -> Tensor:
    """Mean KL divergence, in nats, from the target's distribution to what its output layer says of mapped states.

    Args:
        alignment: the map.
        states: of draft and target.
        positions: numbers of those to compare at, shape (n,), int64.
        output: of the target.
    """
    device = alignment.weight.device
    with torch.no_grad():
        wanted = proposals(states.of_target(positions).to(device), output).log_softmax(-1)
    found = proposals(alignment(states.of_draft(positions).to(device)), output).log_softmax(-1)
    return functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def _judged(states: PairedStates) -> list[np.ndarray]:
    positions = spread_over(states.of_side(JUDGING), _HELD_OUT_POSITIONS)
    return np.array_split(positions, -(-len(positions) // 512))


@torch.no_grad()
def _held_out(alignment: AffineAlignment, states: PairedStates, output: OutputLayer) -> float:
    parts = _judged(states)
    return sum(len(part) * float(divergence(alignment, states, part, output)) for part in parts) / sum(map(len, parts))


def _start(ridge: AffineAlignment, states: PairedStates, output: OutputLayer) -> AffineAlignment:
    """What training begins with: least squares, or no map at all where both widths are one and that diverges less.

    A draft that was made of its target's layers and has its output layer speaks of the same space already.
    """
    if ridge.draft_size == ridge.target_size:
        none = AffineAlignment(ridge.draft_size, ridge.target_size).to(ridge.weight.device)
        if _held_out(none, states, output) < _held_out(ridge, states, output):
            return none
    return copy.deepcopy(ridge)


def _train(
    settings: AlignmentSettings,
    alignment: AffineAlignment,
    states: PairedStates,
    output: OutputLayer,
    publish: Callable[[Outcome], None],
) -> Outcome:
    loop = settings.loop
    chosen = [states.digest, weights_digest(alignment), settings.check_steps, settings.patience]
    batches = PositionBatches(states.of_side(TRAINING), loop.batch * loop.length, loop.seed, json.dumps(chosen))
    return train(
        alignment,
        lambda batch: divergence(alignment, states, batch.numpy(), output),
        batches,
        loop,
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publish,
        stopping=EarlyStopping(lambda: _held_out(alignment, states, output), settings.check_steps, settings.patience),
    )
