"""Train a network that predicts which of a draft's candidates the target will accept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional

from ...decoders.draft_tree.alignment import AffineAlignment, DraftTreeModelError
from ...decoders.draft_tree.files import load_acceptance, load_alignment, save_acceptance, usual_alignment
from ...decoders.draft_tree.predictor import AcceptancePredictor, Label, PredictorShape, calibrating_temperature
from ...errors import FitError
from ...models.identity import weights_digest
from ...models.language_model import LanguageModel
from ...models.output_head import output_layer
from ..cards import Facts, Section, show, size_of, training_lines, write_card
from ..loop import Outcome, train_beside
from ..settings import LoopSettings, PairSettings, small_network_loop
from ..text.prompts import JUDGING, TRAINING
from ..text.states import PairedStates
from .calibration import CALIBRATED, PLOT, RAW, SHARPENED, AcceptanceReport, judge, odds_of, reliability_plot
from .pair_text import REPORTED, open_pair, read_text
from .verifications import verifications

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
        VocabularyMismatchError: they do not number the same tokens.
        DraftTreeModelError: there is no alignment, or it does not fit.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    if not 0 < settings.label_temperature < float("inf"):
        raise FitError(f"--label-temperature must be above 0, got {settings.label_temperature}")
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
