"""Train Medusa heads for a target, on text that it writes itself (Cai et al., arXiv 2401.10774, Medusa-1)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from ..decoders.medusa import MedusaHeads, expected_length, load_heads, save_heads, sparse
from ..files import write_text
from ..loading.find_model import load_model
from ..loading.pair import Pair
from ..models.output_head import output_layer
from .card import Facts
from .distilled_text import check_text_settings, distil_text, frequent_tokens
from .early_stopping import EarlyStopping
from .errors import FitError
from .head_accuracy import accuracies
from .heads_loss import DECAY, heads_loss
from .heads_settings import HeadsSettings, check_heads_settings
from .hidden_states import HiddenStates, hidden_states
from .loop import LoopSettings, Outcome, device_of, train
from .medusa_report import MedusaReport, medusa_card
from .medusa_speed import measure_speed, speed_prompts
from .own_text_settings import check_folders, dtype_of
from .position_batches import POSITIONS, PositionBatches, require_batch
from .prompt_windows import JUDGING, TRAINING, cut_prompts

_HELD_OUT_POSITIONS = 4096


def _loop() -> LoopSettings:
    return LoopSettings(tokens=4_000_000, batch=4, length=256, learning_rate=1e-3, optimiser="adamw", weight_decay=0.0)


@dataclass(kw_only=True)
class MedusaSettings(HeadsSettings):
    """Train Medusa heads for any causal language model of transformers; the model itself stays as it is.

    The target continues prompts cut from a corpus or from plain text; its hidden states along what it wrote are
    computed once, and the heads learn from them which tokens come after the next one. All of this is kept in the folder
    of the run, so that a run that was killed goes on where it was and another with the same text need not write it
    again.
    """

    out: Path
    """Folder to write. Called <target>-medusa beside the target's own folder, decoders find it by themselves."""
    heads: int = 5
    """Number of heads; the first predicts the token after the next one."""
    blocks: int = 1
    """Residual blocks of each head."""
    own_output: bool = False
    """Give each head a copy of the target's output layer to train; larger files."""
    vocabulary: int = 0
    """Let heads propose only the so many most frequent tokens of the target's own text; 0 for all. That spares most of
    their arithmetic where a vocabulary is large, and decoding stays lossless."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=_loop)
    """How to train; a step takes --batch times --length positions of the text, wherever they are."""


def make_medusa(settings: MedusaSettings) -> MedusaReport:
    """Run the ``medusa`` command.

    Raises:
        ModelNotFoundError: there is no such target.
        UnsupportedModelError: it has no output layer, or cannot be decoded in trees.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    check_heads_settings(settings, loop, {"heads": 1, "blocks": 1, "vocabulary": 0})
    check_folders(settings.target, settings.out)
    if loop.threads:
        torch.set_num_threads(loop.threads)
    model, tokenizer = load_model(settings.target, dtype=dtype_of(settings, loop, frozen=True), device=device_of(loop))
    target_name = Path(settings.target).name
    if Path(settings.target).expanduser().exists():
        model.name_or_path = target_name  # files that are passed on do not say where it was
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokens = len(output_layer(model).weight)
    if settings.vocabulary > tokens:
        raise FitError(f"--vocabulary {settings.vocabulary} is more than the target's {tokens} tokens: 0 takes all")
    check_text_settings(settings.own_text, model, settings.heads + 1, f"{settings.heads} heads")
    # Weights are left as they are until the end: what is prepacked gives other hidden states, if only a little.
    pair = Pair(model, None, tokenizer, prepack=False)
    prompts = cut_prompts(
        tokenizer, settings.corpus, settings.text, settings.own_text.texts, settings.own_text.prompt_tokens, loop.seed
    )
    most = settings.own_text.new_tokens * int((prompts.side == TRAINING).sum())  # fewer where the target ends a text
    require_batch(most, loop.batch * loop.length, POSITIONS)
    text = distil_text(model, pair.eos_token_ids, prompts, settings.own_text, loop.seed, loop.work)
    states = hidden_states(model, text)
    heads = MedusaHeads.for_target(
        model,
        settings.heads,
        blocks=settings.blocks,
        own_output=settings.own_output,
        vocabulary=frequent_tokens(text.written(), settings.vocabulary),
    )
    own = sum(parameter.numel() for parameter in heads.parameters())
    facts = Facts(
        name=settings.out.name,
        summary=_summary(settings, target_name, heads),
        parameters=own,
        stored=own,
        licence=settings.licence,
        sources=prompts.sources,
        target=target_name,
    )

    def card(outcome: Outcome, report: MedusaReport | None) -> str:
        return medusa_card(facts, settings.own_text, loop, pair.target.dtype, outcome, report)

    def publish(outcome: Outcome) -> None:
        save_heads(heads, settings.out, pair.target, card=card(outcome, None))

    outcome, stopping = _train(settings, heads, states, publish)
    heads.eval()
    accuracy, by_domain = accuracies(heads, states, states.of_side(JUDGING))
    heads.accuracies = accuracy.rows
    publish(outcome)
    tree = sparse(heads.accuracies, settings.tree_size)
    # The heads are loaded anew, so that what is measured is what was written; the target is prepacked, as decoders have
    # it on a CPU, and of the type that it was trained with.
    pair = Pair(model, None, tokenizer)
    report = MedusaReport(
        accuracy=accuracy,
        by_domain=by_domain,
        tree=tree,
        expected=expected_length(tree, heads.accuracies),
        speed=measure_speed(
            pair,
            load_heads(settings.out, pair.target),
            speed_prompts(text, settings.report_prompts),
            settings.tree_size,
            settings.report_tokens,
        ),
        new_tokens=settings.report_tokens,
        loss_before=stopping.first,
        held_out_loss=stopping.best,
    )
    write_text(settings.out / "README.md", card(outcome, report))
    report.show(settings.out.name)
    return report


def _train(
    settings: MedusaSettings, heads: MedusaHeads, states: HiddenStates, publish: Callable[[Outcome], None]
) -> tuple[Outcome, EarlyStopping]:
    loop, count, device = settings.loop, settings.heads, heads.weight.device
    judged = states.of_side(JUDGING)
    if not len(judged):
        raise FitError("the target ended every text that was kept apart at once: give more --texts")
    judged = judged[np.linspace(0, len(judged) - 1, min(len(judged), _HELD_OUT_POSITIONS)).astype(np.int64)]

    def loss_at(positions: np.ndarray) -> Tensor:
        return heads_loss(heads, states.hidden(positions).to(device), states.labels(positions, count).to(device))

    @torch.no_grad()
    def held_out_loss() -> float:
        parts = np.array_split(judged, -(-len(judged) // 512))
        return sum(len(part) * float(loss_at(part)) for part in parts) / len(judged)

    stopping = EarlyStopping(held_out_loss, settings.check_steps, settings.patience)
    chosen = [states.text.digest, asdict(heads.shape), DECAY, settings.check_steps, settings.patience]
    batches = PositionBatches(states.of_side(TRAINING), loop.batch * loop.length, loop.seed, json.dumps(chosen))
    outcome = train(
        heads,
        lambda batch: loss_at(batch.numpy()),
        batches,
        loop,
        loop.work / f"{settings.out.name}.pt",
        on_checkpoint=publish,
        stopping=stopping,
    )
    return outcome, stopping


def _summary(settings: MedusaSettings, target: str, heads: MedusaHeads) -> str:
    output = "output layers of their own" if settings.own_output else f"the output layer of {target}"
    words = f"They propose the {heads.shape.outputs:,} most frequent tokens. " if settings.vocabulary else ""
    return (
        f"{settings.heads} Medusa head{'s' * (settings.heads > 1)} for {target}, with {settings.blocks} residual "
        f"block{'s' * (settings.blocks > 1)} each and {output}. {words}They draft tokens that {target} then checks: "
        "its greedy or sampled text stays its own."
    )
