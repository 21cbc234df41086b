"""Train a network that says which of a draft's candidates the target will accept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional

from ..decoders.draft_tree import (
    AcceptancePredictor,
    AffineAlignment,
    DraftTreeModelError,
    PredictorShape,
    load_acceptance,
    load_alignment,
    save_acceptance,
    usual_alignment,
)
from ..decoders.draft_tree.predictor import Label, calibrating_temperature
from ..models.language_model import LanguageModel
from ..models.output_head import output_layer
from ..models.weight_hashes import weights_digest
from .acceptance_report import CALIBRATED, PLOT, RAW, SHARPENED, AcceptanceReport, acceptance_card, judge, odds_of
from .card import Facts
from .early_stopping import EarlyStopping
from .errors import FitError
from .loop import LoopSettings, Outcome, train
from .paired_states import PairedStates
from .paired_text import REPORTED, PairSettings, check_pair_settings, open_pair, pair_loop, read_text, spread_over
from .position_batches import PositionBatches
from .prompt_windows import JUDGING, TRAINING
from .reliability import reliability_plot
from .verifications import Verifications, verifications

_HELD_OUT_NODES = 4096


@dataclass(kw_only=True)
class AcceptanceSettings(PairSettings):
    """Train a network that says which of a draft's candidates the target will accept; both models stay as they are.

    The target continues prompts, both models read what it wrote, and at every position the draft's candidates are
    verified. From the draft's aligned state, its probability and entropy and the depth in the tree the network learns
    what comes of that.
    """

    out: Path
    """Folder to write. Called <draft>-acceptance beside the draft's own folder, decoders find it by themselves."""
    alignment: str | None = None
    """Folder or name of the draft's alignment; by default the one that decoders find by themselves."""
    label: Label = "match"
    """What it means to accept. match: greedy decoding; probability: sampling, candidates are the likeliest; ratio:
    sampling, candidates are drawn."""
    label_temperature: float = 1.0
    """Temperature of the sampling, for the labels probability and ratio."""
    children: int = 5
    """Candidates at every position."""
    depth: int = 4
    """Depth of the deepest candidates in the trees."""
    width: int = 64
    """Of the network's hidden layers."""
    aligned_scores: bool = True
    """Let the network also read what the target's output layer says of the aligned state; a decoder then has to compute
    that, which is dear where the vocabulary is large."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=lambda: pair_loop(3e-3))
    """How to train; a step takes the candidates at --batch times --length nodes of trees, wherever they are."""


def make_acceptance(settings: AcceptanceSettings) -> AcceptanceReport:
    """Run the ``acceptance`` command.

    Raises:
        ModelNotFoundError, UnknownPairError: there are no such models.
        VocabularyMismatchError: they do not number the same tokens.
        DraftTreeModelError: there is no alignment, or it does not fit.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    check_pair_settings(settings, loop, settings.out, {"children": 1, "depth": 1, "width": 1})
    if not 0 < settings.label_temperature < float("inf"):
        raise FitError(f"--label-temperature {settings.label_temperature} makes no sense: give more than 0")
    pair, draft = open_pair(settings, loop)
    if settings.children > pair.target.vocabulary_size:
        raise FitError(
            f"--children {settings.children} is more than the {pair.target.vocabulary_size} tokens there are"
        )
    alignment = _alignment(settings, draft, pair.target)
    paired = read_text(settings, loop, pair, draft)
    target = paired.target
    found = verifications(
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
    own = sum(parameter.numel() for parameter in predictor.parameters())
    facts = Facts(
        name=settings.out.name,
        summary=(
            f"A small network that says how likely {target.name} will accept a token that {draft.name} proposes, "
            f"before {target.name} has read it. It reads the state of {draft.name} mapped by its alignment."
        ),
        parameters=own,
        stored=own,
        licence=settings.licence,
        sources=paired.sources,
        target=target.name,
    )

    def publish(outcome: Outcome, report: AcceptanceReport | None = None) -> None:
        card = acceptance_card(
            facts, settings.own_text, loop, target.dtype, settings.label, settings.children, outcome, report
        )
        save_acceptance(predictor, settings.out, draft, target, alignment, card=card)

    outcome, stopping = _train(settings, predictor, found, alignment, publish)
    chosen_by = found.of_side(JUDGING)
    odds, labels = odds_of(predictor, found, chosen_by)
    predictor.temperature.fill_(calibrating_temperature(odds, labels))
    publish(outcome)
    kept = load_acceptance(settings.out, draft, target, alignment)  # so that what is measured is what was written
    report = judge(kept, found, chosen_by, found.of_side(REPORTED), (stopping.first, stopping.best))
    drawn = {"draft's probability": RAW, "among the candidates": SHARPENED, "predictor": CALIBRATED}
    reliability_plot(settings.out / PLOT, {name: report.scores[which] for name, which in drawn.items()})
    publish(outcome, report)
    report.show(settings.out.name)
    return report


def enough(states: PairedStates, nodes: int) -> np.ndarray:
    """Numbers of the positions to verify at: all that nothing is trained on, and of the others what training asks for.

    Args:
        states: of draft and target; their texts are in a random order.
        nodes: how many training asks for. A position is at least one.

    Returns:
        Whole texts, shape (n,), int64, ascending.
    """
    side = states.text.side[states.row]
    trained = np.flatnonzero(side == TRAINING)
    last = states.row[trained[min(nodes, len(trained)) - 1]]
    return np.flatnonzero((side != TRAINING) | (states.row <= last))


def _alignment(settings: AcceptanceSettings, draft: LanguageModel, target: LanguageModel) -> AffineAlignment:
    if settings.alignment is not None:
        return load_alignment(settings.alignment, draft, target).requires_grad_(False)
    found = usual_alignment(draft, target)
    if found is None:
        raise DraftTreeModelError(
            f"there is no alignment for {draft.name}, which the predictor's states are mapped by; fit one: python -m "
            f"specgym.decoding.fit alignment --draft {draft.name} --target {target.name} --out {draft.name}-alignment, "
            "or give --alignment"
        )
    return found.requires_grad_(False)


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


def _train(
    settings: AcceptanceSettings,
    predictor: AcceptancePredictor,
    found: Verifications,
    alignment: AffineAlignment,
    publish: Callable[[Outcome], None],
) -> tuple[Outcome, EarlyStopping]:
    loop = settings.loop
    judged = spread_over(found.of_side(JUDGING), _HELD_OUT_NODES)

    def loss_at(nodes: np.ndarray) -> Tensor:
        features, labels = found.examples(nodes)
        return functional.binary_cross_entropy_with_logits(predictor(features), labels)

    @torch.no_grad()
    def held_out_loss() -> float:
        return float(loss_at(judged))

    asked = [settings.children, settings.label_temperature, settings.check_steps, settings.patience]
    chosen = [found.states.digest, weights_digest(alignment), asdict(predictor.shape), *asked]
    stopping = EarlyStopping(held_out_loss, settings.check_steps, settings.patience)
    outcome = train(
        predictor,
        lambda batch: loss_at(batch.numpy()),
        PositionBatches(found.of_side(TRAINING), loop.batch * loop.length, loop.seed, json.dumps(chosen)),
        loop,
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publish,
        stopping=stopping,
    )
    return outcome, stopping
