"""Train a target and its Medusa heads together, on text that the target wrote before (arXiv 2401.10774, Medusa-2)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel

from ..decoders.medusa import MedusaHeads, heads_for, save_heads
from ..files import write_text
from ..loading.checkpoint import save_checkpoint
from ..loading.find_model import load_model
from ..loading.pair import Pair
from ..models.language_model import LanguageModel
from ..models.weight_hashes import heads_digest
from .card import Facts, write_card
from .distilled_text import DistilledText, check_text_settings, distil_text
from .early_stopping import EarlyStopping
from .errors import FitError
from .head_accuracy import accuracies
from .heads_loss import DECAY
from .heads_settings import HeadsSettings, check_heads_settings
from .hidden_states import hidden_states
from .joint_report import JointReport, Measured
from .loop import LoopSettings, Outcome, device_of, train
from .measure import measure_domains
from .medusa_speed import measure_speed, speed_prompts
from .own_text_settings import check_folders, dtype_of
from .position_batches import TEXTS, PositionBatches, require_batch
from .prompt_windows import JUDGING, TRAINING, cut_prompts
from .publish import complete
from .together import Together, check_together

_HELD_OUT_TEXTS = 64


@dataclass
class JointLoop(LoopSettings):
    """How to train both; a window is a whole text, so that its length is no option."""

    length: tyro.conf.Suppress[int] = 0


def _loop() -> JointLoop:
    return JointLoop(tokens=2_000_000, batch=8, learning_rate=1e-4, optimiser="adamw", weight_decay=0.0)


@dataclass(kw_only=True)
class JointSettings(HeadsSettings):
    """Train a target and its Medusa heads together; what comes out is another target, with heads of its own.

    The heads must have been trained by the medusa command, which is their warm-up. The target continues prompts, as
    there; then all is trained so that the heads guess better while the target stays close to what it was, in KL
    divergence. Its texts are no longer those of the original: the report says how far they are.
    """

    out: Path
    """Folder for the new target. Its heads go to a folder beside it, <out>-medusa."""
    heads_from: str | None = None
    """Folder of the target's heads; by default those that decoders find by themselves."""
    heads_weight: float = 0.01
    """What the heads' loss weighs beside the divergence in the end; it rises to that with a sine."""
    heads_rate: float = 4.0
    """Learning rate of the heads, as a multiple of the target's."""
    lora_rank: int = 0
    """Train low-rank adapters of the target's layers of this rank, which are merged at the end; 0 trains all weights.
    Needs peft, and much less memory."""
    loop: tyro.conf.OmitArgPrefixes[JointLoop] = field(default_factory=_loop)
    """How to train; a step takes --batch of the target's own texts."""


def make_joint(settings: JointSettings) -> JointReport:
    """Run the ``medusa-joint`` command.

    Raises:
        ModelNotFoundError: there is no such target.
        MedusaHeadsError: it has no heads.
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, there is too little text, or ``peft`` is not installed.
        TrainingError: training cannot go on.
    """
    _check(settings)
    own_text = settings.own_text
    loop = replace(settings.loop, length=own_text.prompt_tokens + own_text.new_tokens)
    if loop.threads:
        torch.set_num_threads(loop.threads)
    model, tokenizer = load_model(settings.target, dtype=dtype_of(settings, loop, frozen=False), device=device_of(loop))
    pair = Pair(model, None, tokenizer, prepack=False)
    heads = heads_for(pair.target, settings.heads_from).float()  # loaded, they are of the target's type
    heads.attach(model)
    check_together(heads, settings.lora_rank)
    name = Path(settings.target).name  # files that are passed on do not say where it was
    check_text_settings(own_text, model, heads.shape.heads + 1, f"{heads.shape.heads} heads")
    prompts = cut_prompts(tokenizer, settings.corpus, settings.text, own_text.texts, own_text.prompt_tokens, loop.seed)
    require_batch(int((prompts.side == TRAINING).sum()), loop.batch, TEXTS)
    text = distil_text(model, pair.eos_token_ids, prompts, own_text, loop.seed, loop.work)
    before = _measured(settings, settings.target, partial(heads_for, heads=settings.heads_from), text, prompts.held_out)
    trained, outcome, stopping = _train(settings, loop, model, heads, text)
    trained.name_or_path = settings.out.name
    facts = Facts(
        name=settings.out.name,
        summary=_summary(settings, name),
        parameters=0,
        stored=0,
        licence=settings.licence,
        sources=prompts.sources,
    )
    facts = complete(facts, trained)
    tokenizer.save_pretrained(settings.out)
    save_checkpoint(trained, settings.out, card=write_card(facts, loop, outcome, None))
    heads.accuracies = ()  # those of the warm-up
    folder, target = _heads_folder(settings), LanguageModel(trained, prepack=False)
    save_heads(heads, folder, target)
    after = _measured(settings, str(settings.out), partial(heads_for, heads=folder), text, prompts.held_out)
    heads.accuracies = after.accuracy.rows
    report = JointReport(facts.name, name, before, after, stopping.first, stopping.best)
    card = report.card(facts, own_text, loop, target.dtype, outcome)
    save_heads(heads, folder, target, card=card)
    write_text(settings.out / "README.md", card)
    report.show()
    return report


def _heads_folder(settings: JointSettings) -> Path:
    return settings.out.with_name(f"{settings.out.name}-medusa")


def _train(
    settings: JointSettings, loop: LoopSettings, model: PreTrainedModel, heads: MedusaHeads, text: DistilledText
) -> tuple[PreTrainedModel, Outcome, EarlyStopping]:
    """The target after training; the heads are changed in place."""
    warmed_up = heads_digest(heads)
    with torch.random.fork_rng():
        torch.manual_seed(loop.seed)  # of the adapters
        together = Together(model, heads.train(), settings.heads_weight, settings.lora_rank)
    tokens, prompts, ends = (torch.from_numpy(each.astype(np.int64)) for each in (text.tokens, text.prompts, text.ends))
    judged = np.flatnonzero(text.side == JUDGING)[:_HELD_OUT_TEXTS]

    def loss_of(rows: Tensor) -> Tensor:
        loss: Tensor = together(*(each[rows].to(model.device) for each in (tokens, prompts, ends)))
        return loss

    @torch.no_grad()
    def held_out_loss() -> float:
        together.before_step(1.0)  # what counts in the end
        parts = torch.from_numpy(judged).split(loop.batch)
        return sum(len(part) * float(loss_of(part)) for part in parts) / len(judged)

    stopping = EarlyStopping(held_out_loss, settings.check_steps, settings.patience)
    chosen = [text.digest, warmed_up, DECAY, settings.heads_weight, settings.heads_rate, settings.lora_rank]
    key = json.dumps([*chosen, settings.check_steps, settings.patience])
    outcome = train(
        together,
        loss_of,
        PositionBatches(np.flatnonzero(text.side == TRAINING), loop.batch, loop.seed, key, TEXTS),
        loop,
        loop.work / f"{settings.out.name}.pt",
        stopping=stopping,
        rates=lambda name: settings.heads_rate if name.startswith("heads.") else 1.0,
        before_step=together.before_step,
    )
    heads.eval()
    return together.finished(), outcome, stopping


def _measured(
    settings: JointSettings,
    name: str,
    heads_of: Callable[[LanguageModel], MedusaHeads],
    text: DistilledText,
    held_out: Mapping[str, np.ndarray],
) -> Measured:
    """What a target and its heads, loaded as decoders load them, are worth on text kept apart."""
    model, tokenizer = load_model(name, device=device_of(settings.loop))
    pair = Pair(model, None, tokenizer)
    heads = heads_of(pair.target)
    quality = measure_domains(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        # Only where accuracies are judged: what was written for the original's other texts is of no use here.
        kept = text.side == JUDGING
        apart = replace(
            text,
            **{name: getattr(text, name)[kept] for name in ("tokens", "prompts", "ends", "domain", "side")},
            folder=Path(folder),
        )
        states = hidden_states(model, apart)
        accuracy, _ = accuracies(heads, states, np.arange(len(states)))
    heads.accuracies = accuracy.rows
    prompts = speed_prompts(text, settings.report_prompts)
    return Measured(quality, accuracy, measure_speed(pair, heads, prompts, settings.tree_size, settings.report_tokens))


def _check(settings: JointSettings) -> None:
    """Refuse what cannot work, before anything is loaded."""
    check_heads_settings(settings, settings.loop, {"lora_rank": 0})
    for name in ("heads_weight", "heads_rate"):
        if not 0 < getattr(settings, name) < float("inf"):
            raise FitError(f"--{name.replace('_', '-')} must be above 0, got {getattr(settings, name)}")
    if settings.dtype == "bfloat16" and not settings.lora_rank:
        raise FitError("weights that are trained must be float32: leave out --dtype, or give --lora-rank")
    if settings.loop.length:
        raise FitError("a step takes whole texts: leave out the length of the loop's settings")
    read = () if settings.heads_from is None else (settings.heads_from,)
    for folder in (settings.out, _heads_folder(settings)):
        check_folders(settings.target, folder, *read)


def _summary(settings: JointSettings, target: str) -> str:
    how = f"low-rank adapters of rank {settings.lora_rank}, merged" if settings.lora_rank else "all weights"
    return (
        f"{target}, trained together with its Medusa heads ({how}) to be guessed more easily. It is another model than "
        f"{target}: what it says differs as far as the tables below have it."
    )
