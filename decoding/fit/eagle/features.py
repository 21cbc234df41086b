"""Hidden states of a target along its text, at the layers that an EAGLE head reads; computed once, kept in a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ...drafts.eagle.head import EagleHead
from ..text.states import kept_states, require_finite
from ..text.target_text import TargetText


@dataclass(frozen=True)
class Features:
    """Hidden states of a target at every position of its text.

    Attributes:
        text: the text.
        starts: number of each text's first position, shape (texts,), int64.
        stored: those of the layers that a head reads, as `EagleHead.prepared` makes them, and behind them that behind
            the final norm, shape (positions, layers * width + width), float16, in a file.
        width: of the target.
    """

    text: TargetText
    starts: np.ndarray
    stored: np.ndarray
    width: int

    def of(self, rows: np.ndarray, device: torch.device) -> TextBatch:
        """Some texts as a batch; ``rows`` are their numbers, shape (n,)."""
        ends = self.text.ends[rows]
        width = int(ends.max())
        kept = np.arange(width) < ends[:, None]
        places = np.where(kept, self.starts[rows][:, None] + np.arange(width), self.starts[rows][:, None])
        tokens = torch.from_numpy(self.text.tokens[rows, :width].astype(np.int64)).to(device)
        states, last = torch.from_numpy(self.stored[places]).to(device).tensor_split((-self.width,), -1)
        prompts = torch.from_numpy(self.text.prompts[rows]).to(device)
        return TextBatch(tokens, prompts, torch.from_numpy(ends).to(device), states, last)


@dataclass(frozen=True)
class TextBatch:
    """Texts of a target, padded to one width.

    Attributes:
        tokens: shape (n, width), int64.
        prompts: tokens of each prompt, shape (n,), int64.
        ends: tokens of each text, likewise.
        states: of the layers that a head reads, shape (n, width, layers * target width), float16.
        last: behind the target's final norm, shape (n, width, target width), float16.
    """

    tokens: Tensor
    prompts: Tensor
    ends: Tensor
    states: Tensor
    last: Tensor

    def counted(self, step: int) -> Tensor:
        """Positions from which the head guesses a token that the target wrote, shape (n, width - 1), bool."""
        place = torch.arange(self.tokens.shape[1] - 1, device=self.tokens.device)
        after_prompt = place >= (self.prompts[:, None] - 2).clamp(min=0) + step
        return after_prompt & (place < self.ends[:, None] - 2)


def features_of(model: PreTrainedModel, head: EagleHead, text: TargetText, bfloat16: bool, batch: int = 16) -> Features:
    """Hidden states along a text; computed, ``batch`` texts at a time, or read from their file.

    Args:
        model: the target.
        head: says which layers are read, and how.
        text: that the target wrote, or reads.
        bfloat16: multiply matrices in that type.
        batch: texts at a time.

    Raises:
        FitError: the disk is too small, a state is not finite in float16, or the file is damaged.
    """
    shape = head.shape
    facts = [text.digest, shape.layers, shape.norm_features, shape.norm_eps, bfloat16]
    path = text.folder / f"features-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.npy"
    starts = np.cumsum(text.ends) - text.ends
    whole = int(text.ends.sum()), (len(shape.layers) + 1) * shape.target_hidden_size

    def fill(states: np.ndarray) -> None:
        _compute(states, model, head, text, starts, batch, bfloat16)

    stored = kept_states(path, whole, fill)
    return Features(text, starts, stored, shape.target_hidden_size)


@torch.inference_mode()
def _compute(
    stored: np.ndarray,
    model: PreTrainedModel,
    head: EagleHead,
    text: TargetText,
    starts: np.ndarray,
    batch: int,
    bfloat16: bool,
) -> None:
    """Fill ``stored``, texts of like length together, so that little is padded."""
    order = np.argsort(text.ends, kind="stable")
    for first in tqdm(range(0, len(order), batch), unit="batch", mininterval=5.0, desc="hidden states"):
        rows = order[first : first + batch]
        width = int(text.ends[rows].max())
        ids = torch.from_numpy(text.tokens[rows, :width].astype(np.int64)).to(model.device)
        # Padding stands behind a text, where a causal model does not look. Logits are not needed.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            output = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        states = torch.cat([output.hidden_states[layer] for layer in head.shape.layers], -1).float()
        both = torch.cat([head.prepared(states), output.hidden_states[-1].float()], -1).to(torch.float16).cpu().numpy()
        for row, computed in zip(rows, both, strict=True):
            part = computed[: text.ends[row]]
            require_finite(part, model)
            stored[starts[row] : starts[row] + len(part)] = part
