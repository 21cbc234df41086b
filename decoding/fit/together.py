"""A target in training with its Medusa heads, beside what it was (Cai et al., arXiv 2401.10774, section 2.2.2)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..decoders.medusa import MedusaHeads
from .errors import FitError
from .heads_loss import heads_loss
from .labels import labels_of


def check_together(heads: MedusaHeads, lora_rank: int) -> None:
    """Refuse what cannot be trained jointly.

    Args:
        heads: of the target.
        lora_rank: rank of the adapters; 0 trains all weights.

    Raises:
        FitError: adapters are asked for and ``peft`` is not installed, or the heads cannot follow the target.
    """
    if heads.shape.vocabulary and not heads.shape.own_output and not lora_rank:
        # They hold a copy of some rows of the output layer, which would stay behind.
        raise FitError("heads of a reduced vocabulary need the target's output layer as it is: give --lora-rank")
    if lora_rank:
        _peft()


class Together(nn.Module):
    """What is trained jointly: a target, or low-rank adapters of its layers (Hu et al., arXiv 2106.09685), and heads.

    Args:
        model: the target; changed in place, or given adapters.
        heads: attached to it.
        heads_weight: what the heads' loss weighs in the end; before that it rises with a sine, from 0 at the start.
        lora_rank: rank of the adapters; 0 trains all weights.

    Raises:
        FitError: adapters are asked for and ``peft`` is not installed, or the heads cannot follow the target.
    """

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads, heads_weight: float, lora_rank: int) -> None:
        super().__init__()
        check_together(heads, lora_rank)
        self.heads = heads
        self._heads_weight, self._progress = heads_weight, 1.0
        self._original: tuple[nn.Module, ...] = ()  # in a tuple, so that it does not count as part of this module
        self.target: Any
        if lora_rank:
            self.target = _with_adapters(model, lora_rank)
        else:
            self._original = (copy.deepcopy(model).requires_grad_(False).eval(),)
            self.target = model.requires_grad_(True)

    def train(self, mode: bool = True) -> Together:
        """Dropout stays off in the target, since what it is compared with has none."""
        super().train(mode)
        self.target.eval()
        return self

    def before_step(self, progress: float) -> None:
        """Say how far training is, from 0 to 1."""
        self._progress = progress

    def forward(self, tokens: Tensor, prompts: Tensor, ends: Tensor) -> Tensor:
        """The divergence of the original from the target, and the heads' loss by its weight.

        Args:
            tokens: texts that the original wrote, with their prompts, shape (n, width), int64.
            prompts: tokens of each prompt, at least 1, shape (n,), int64.
            ends: tokens of each prompt and what was written together, shape (n,), int64.

        Returns:
            A scalar, in nats: the mean KL divergence over the tokens written, plus the weight times `heads_loss`.
        """
        width = int(ends.max())
        ids, place = tokens[:, :width], torch.arange(width, device=tokens.device)
        prompts, ends = prompts[:, None], ends[:, None]
        written = (place >= prompts - 1) & (place < ends - 1)  # positions whose next token was written
        with torch.no_grad():
            wanted = self._original_scores(ids)[written].float().log_softmax(-1)
        output = self.target(input_ids=ids, use_cache=False, output_hidden_states=True)
        found = output.logits[written].float().log_softmax(-1)
        divergence = functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
        row, first = ((place >= prompts - 2) & (place < ends - 2)).nonzero(as_tuple=True)
        labels = labels_of(ids, ends[:, 0], row, first, self.heads.shape.heads)
        weight = self._heads_weight * math.sin(self._progress * math.pi / 2)
        return divergence + weight * heads_loss(self.heads, output.hidden_states[-1][row, first], labels)

    def finished(self) -> PreTrainedModel:
        """The target with adapters merged into its weights."""
        model: PreTrainedModel = self.target if self._original else self.target.merge_and_unload()
        return model.requires_grad_(False).eval()

    def _original_scores(self, ids: Tensor) -> Tensor:
        if self._original:
            scores: Tensor = self._original[0](input_ids=ids, use_cache=False).logits
            return scores
        with self.target.disable_adapter():
            scores = self.target(input_ids=ids, use_cache=False).logits
        return scores


def _with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    peft = _peft()
    # All linear layers but the output layer, which heads share.
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    made: nn.Module = peft.get_peft_model(model, settings)
    return made


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise FitError('--lora-rank needs peft: pip install "specgym[lora]", or leave it out') from None
    return peft
