"""Train a target and its Medusa heads together, on text that the target wrote before (arXiv 2401.10774, Medusa-2)."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...decoders.medusa.files import heads_for, save_heads
from ...decoders.medusa.heads import MedusaHeads
from ...errors import FitError, number
from ...files import write_text
from ...loading.checkpoint import save_checkpoint
from ...loading.find_model import load_model
from ...loading.pair import Pair
from ...models.language_model import LanguageModel
from ..cards import Facts, Section, show, size_of, training_lines, write_card
from ..loop import EarlyStopping, Outcome, mean_loss, train
from ..measure import measure_domains
from ..settings import HeadsSettings, LoopSettings, check_out, check_own_text, checked_option, dtype_of, load_target
from ..text.corpus_text import TEXTS, PositionBatches
from ..text.prompts import JUDGING, TRAINING
from ..text.states import hidden_states, labels_of
from ..text.target_text import TargetText, own_text
from .heads import DECAY, heads_loss
from .report import JointReport, TargetMeasurements, accuracies, measure_speed, speed_prompts

_HELD_OUT_TEXTS = 64


@dataclass
class JointLoop(LoopSettings):
    """Training of target and heads; a window is a whole text, so that its length is no option."""

    length: tyro.conf.Suppress[int] = 0


@dataclass(kw_only=True)
class JointSettings(HeadsSettings):
    """Train a target and its Medusa heads together; the result is another target, with heads of its own.

    The heads must have been trained by the medusa command, which is their warm-up. The target continues prompts, as
    there; then joint training improves the guesses of the heads while the target stays close to the original in KL
    divergence. Its texts differ from those of the original: the report says by how much.
    """

    out: Path
    """Folder for the new target. Its heads go to a folder beside it, <out>-medusa."""
    heads_from: str | None = None
    """Folder of the target's heads. Default: those that decoders find by themselves."""
    heads_weight: float = 0.01
    """Final weight of the heads' loss relative to the divergence; it rises to that with a sine."""
    heads_rate: float = 4.0
    """Learning rate of the heads, as a multiple of the target's."""
    lora_rank: int = 0
    """Rank of low-rank adapters of the target's layers, which are merged at the end; 0 trains all weights. Adapters
    need peft, and much less memory."""
    loop: tyro.conf.OmitArgPrefixes[JointLoop] = field(
        default_factory=lambda: JointLoop(
            tokens=2_000_000, batch=8, learning_rate=1e-4, optimiser="adamw", weight_decay=0.0
        )
    )
    """Training; a step takes --batch texts of the target."""

    @property
    def heads_out(self) -> Path:
        """Folder for the heads of the new target."""
        return self.out.with_name(f"{self.out.name}-medusa")


class JointModel(nn.Module):
    """A target, or low-rank adapters of its layers (Hu et al., arXiv 2106.09685), and heads, trained jointly.

    The loss follows Cai et al., arXiv 2401.10774, section 2.2.2.

    Args:
        model: the target; changed in place, or given adapters.
        heads: attached to it.
        heads_weight: final weight of the heads' loss, to which it rises with a sine, from 0.
        lora_rank: rank of the adapters; 0 trains all weights.

    Raises:
        FitError: as for `check_joint`.
    """

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads, heads_weight: float, lora_rank: int) -> None:
        super().__init__()
        check_joint(heads, lora_rank)
        self.heads = heads
        self._heads_weight, self._progress = heads_weight, 1.0
        self._original: tuple[nn.Module, ...] = ()  # in a tuple, so that it does not count as part of this module
        self.target: Any
        if lora_rank:
            peft = _peft()
            # All linear layers but the output layer, which heads share.
            config = peft.LoraConfig(
                r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, target_modules="all-linear"
            )
            self.target = peft.get_peft_model(model, config)
        else:
            self._original = (copy.deepcopy(model).requires_grad_(False).eval(),)
            self.target = model.requires_grad_(True)

    def train(self, mode: bool = True) -> JointModel:
        """Set the training mode, without dropout in the target, since the original has none."""
        super().train(mode)
        self.target.eval()
        return self

    def before_step(self, progress: float) -> None:
        """Set the progress of training, from 0 to 1."""
        self._progress = progress

    def forward(self, tokens: Tensor, prompts: Tensor, ends: Tensor) -> Tensor:
        """The divergence of the target from the original, plus the weighted loss of the heads.

        Args:
            tokens: texts that the original wrote, with their prompts, shape (n, width), int64.
            prompts: tokens of each prompt, at least 1, shape (n,), int64.
            ends: tokens of each prompt with its continuation, shape (n,), int64.

        Returns:
            A scalar, in nats: the mean KL divergence over the tokens written, plus the weight times `heads_loss`.
        """
        width = int(ends.max())
        ids, place = tokens[:, :width], torch.arange(width, device=tokens.device)
        prompts, ends = prompts[:, None], ends[:, None]
        written = (place >= prompts - 1) & (place < ends - 1)  # positions whose next token was written
        with torch.no_grad():
            expected = self._original_logits(ids)[written].float().log_softmax(-1)
        output = self.target(input_ids=ids, use_cache=False, output_hidden_states=True)
        logits = output.logits[written].float().log_softmax(-1)
        divergence = functional.kl_div(logits, expected, log_target=True, reduction="batchmean")
        row, first = ((place >= prompts - 2) & (place < ends - 2)).nonzero(as_tuple=True)
        labels = labels_of(ids, ends[:, 0], row, first, self.heads.shape.heads)
        weight = self._heads_weight * math.sin(self._progress * math.pi / 2)
        return divergence + weight * heads_loss(self.heads, output.hidden_states[-1][row, first], labels)

    def finished(self) -> PreTrainedModel:
        """The target with adapters merged into its weights."""
        model: PreTrainedModel = self.target if self._original else self.target.merge_and_unload()
        return model.requires_grad_(False).eval()

    def _original_logits(self, ids: Tensor) -> Tensor:
        if self._original:
            logits: Tensor = self._original[0](input_ids=ids, use_cache=False).logits
            return logits
        with self.target.disable_adapter():
            logits = self.target(input_ids=ids, use_cache=False).logits
        return logits


def check_joint(heads: MedusaHeads, lora_rank: int) -> None:
    """Refuse heads that cannot be trained jointly.

    Raises:
        FitError: adapters are asked for and ``peft`` is not installed, or the heads cannot follow the target.
    """
    if heads.shape.vocabulary and not heads.shape.own_output and not lora_rank:
        # They hold a copy of some rows of the output layer, which would stay behind.
        raise FitError("heads of a reduced vocabulary need the target's output layer as it is: give --lora-rank")
    if lora_rank:
        _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise FitError('--lora-rank needs peft: pip install "specgym[lora]", or leave it out') from None
    return peft


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
    loop = replace(settings.loop, length=settings.own_text.width)
    loop.set_threads()
    dtype = dtype_of(settings, frozen=False)
    model, tokenizer = load_target(settings.target, dtype=dtype, device=loop.torch_device())
    pair = Pair(model, None, tokenizer, prepack=False)
    heads = heads_for(pair.target, settings.heads_from).float()  # loaded, they are of the target's type
    heads.attach(model)
    check_joint(heads, settings.lora_rank)
    original = Path(settings.target).name  # files that are passed on do not name folders of this machine
    text, prompts = own_text(settings, pair, original, heads.shape.heads + 1, whole=True)
    before = _measure(settings, settings.target, partial(heads_for, heads=settings.heads_from), text, prompts.held_out)
    trained, outcome, stopping = _train(settings, loop, model, heads, text)
    trained.name_or_path = settings.out.name
    how = f"low-rank adapters of rank {settings.lora_rank}, merged" if settings.lora_rank else "all weights"
    facts = Facts(
        name=settings.out.name,
        summary=(
            f"{original}, trained together with its Medusa heads ({how}) to be guessed more easily. It is another "
            f"model than {original}: the tables below say by how much its text differs."
        ),
        licence=settings.licence,
        sources=prompts.sources,
        size=size_of(trained),
    )
    training = [
        f"Medusa-2: the KL divergence from {original}, and the heads' loss with a weight that rises with a sine",
        *training_lines(loop, outcome, "texts", loop.batch, trained.dtype),
        f"{stopping.loss.verdict()} The weights of the lowest loss are kept, so that accuracies after training, which "
        "are counted on the same texts, are a little flattered.",
    ]
    tokenizer.save_pretrained(settings.out)
    save_checkpoint(trained, settings.out, card=write_card(facts, outcome, training, []))
    heads.accuracies = ()  # those of the warm-up
    target = LanguageModel(trained, prepack=False)
    save_heads(heads, settings.heads_out, target)
    load_new = partial(heads_for, heads=settings.heads_out)
    after = _measure(settings, str(settings.out), load_new, text, prompts.held_out)
    heads.accuracies = after.accuracy.rows
    report = JointReport(before, after, stopping.loss)
    note = "The speedup depends on the machine; decoding was greedy."
    card = write_card(facts, outcome, training, [Section("Before and after", [report.table(), note])])
    save_heads(heads, settings.heads_out, target, card=card)
    write_text(settings.out / "README.md", card)
    show(f"{original} before, {facts.name} after", report.table(), stopping.loss.verdict())
    return report


def _check(settings: JointSettings) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    least = {"lora_rank": 0, "tree_size": 1, "report_prompts": 1, "report_tokens": 1}
    check_own_text(settings, "heads", **least)
    for name in ("heads_weight", "heads_rate"):
        checked_option(number, name, getattr(settings, name), above=0)
    if settings.dtype == "bfloat16" and not settings.lora_rank:
        raise FitError("weights that are trained must be float32: leave out --dtype, or give --lora-rank")
    if settings.loop.length:
        raise FitError("a step takes whole texts: leave out the length of the loop's settings")
    for folder in (settings.out, settings.heads_out):
        check_out(folder, settings.target, *([] if settings.heads_from is None else [settings.heads_from]))


def _train(
    settings: JointSettings, loop: LoopSettings, model: PreTrainedModel, heads: MedusaHeads, text: TargetText
) -> tuple[PreTrainedModel, Outcome, EarlyStopping]:
    """The target after training; the heads are changed in place."""
    warmed_up = heads.digest()
    with torch.random.fork_rng():
        torch.manual_seed(loop.seed)  # of the adapters
        joint = JointModel(model, heads.train(), settings.heads_weight, settings.lora_rank)
    arrays = [torch.from_numpy(a.astype(np.int64)) for a in (text.tokens, text.prompts, text.ends)]
    judging = np.flatnonzero(text.side == JUDGING)[:_HELD_OUT_TEXTS]

    def loss_of(rows: Tensor) -> Tensor:
        loss: Tensor = joint(*(array[rows].to(model.device) for array in arrays))
        return loss

    def held_out_loss() -> float:
        joint.before_step(1.0)  # the final weight of the heads
        return mean_loss(lambda rows: loss_of(torch.from_numpy(rows)), judging, loop.batch)

    stopping = EarlyStopping(held_out_loss, settings.check_steps, settings.patience)
    chosen = [text.digest, warmed_up, DECAY, settings.heads_weight, settings.heads_rate, settings.lora_rank]
    key = json.dumps([*chosen, settings.check_steps, settings.patience])
    outcome = train(
        joint,
        loss_of,
        PositionBatches(np.flatnonzero(text.side == TRAINING), loop.batch, loop.seed, key, TEXTS),
        loop,
        loop.work / f"{settings.out.name}.pt",
        stopping=stopping,
        rates=lambda name: settings.heads_rate if name.startswith("heads.") else 1.0,
        before_step=joint.before_step,
    )
    heads.eval()
    return joint.finished(), outcome, stopping


def _measure(
    settings: JointSettings,
    name: str,
    load_heads: Callable[[LanguageModel], MedusaHeads],
    text: TargetText,
    held_out: Mapping[str, np.ndarray],
) -> TargetMeasurements:
    """Measure a target and its heads, loaded as decoders load them, on held-out text."""
    model, tokenizer = load_model(name, device=settings.loop.torch_device())
    pair = Pair(model, None, tokenizer)
    heads = load_heads(pair.target)
    quality = measure_domains(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        # The new target's states are needed only where accuracies are judged, and once.
        kept = text.side == JUDGING
        judged = {name: getattr(text, name)[kept] for name in ("tokens", "prompts", "ends", "domain", "side")}
        states = hidden_states(model, replace(text, **judged, folder=Path(folder)))
        accuracy, _ = accuracies(heads, states, np.arange(len(states)))
    heads.accuracies = accuracy.rows
    prompts = speed_prompts(text, settings.report_prompts)
    speed = measure_speed(pair, heads, prompts, settings.tree_size, settings.report_tokens)
    return TargetMeasurements(quality, accuracy, speed)
