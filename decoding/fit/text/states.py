"""Hidden states of models along a text, computed once, stored and memory-mapped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ...errors import FitError
from ...files import replacing
from ...models.identity import weights_digest
from ...models.output_layer import output_layer, output_module
from ..measure import reading
from .prompts import SPEED, TRAINING
from .target_text import TargetText, join_texts

IGNORED = -100
"""Label that losses ignore."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Positions in a text.

    Attributes:
        text: the text.
        row: row of ``text`` of each position, shape (positions,), int64.
        place: place in that row of each position, likewise.
    """

    text: TargetText
    row: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.row)

    def of_side(self, side: int) -> np.ndarray:
        """Numbers of the positions in texts of one side, shape (m,), int64, ascending."""
        return np.flatnonzero(self.text.side[self.row] == side)


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Positions):
    """States of a target at the positions that something learns from.

    For heads, a position belongs here if the target wrote every token that heads predict from it: the first is the last
    but one of a prompt, from which the first head predicts the first token written. (The target itself predicts the
    token between.) So no token of a prompt is ever a label. For drafts there may also be whole texts (`whole_states`).

    Attributes:
        states: states after the final norm, shape (positions, h), float16, in one file or several.
        encoder: what the target's encoder made of the sources, if it has one.
    """

    states: np.ndarray | Chained
    encoder: EncoderStates | None = None

    def inputs(self, rows: np.ndarray, ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a pass of a draft over texts by their numbers, whose ids have shape (n, m)."""
        if self.encoder is None:
            return {"input_ids": ids}
        states, mask = (part.to(ids.device) for part in self.encoder.of_texts(rows))
        encoded = BaseModelOutput(last_hidden_state=states.to(dtype))
        return {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": ids}

    def hidden(self, positions: np.ndarray) -> Tensor:
        """The states at some positions, shape (m, h), float16."""
        return torch.from_numpy(np.ascontiguousarray(self.states[positions]))

    def labels(self, positions: np.ndarray, heads: int) -> Tensor:
        """Tokens that heads should predict, shape (heads, m), int64; `IGNORED` behind the end of a text."""
        rows, row = np.unique(self.row[positions], return_inverse=True)
        texts, ends = (torch.from_numpy(a[rows].astype(np.int64)) for a in (self.text.tokens, self.text.ends))
        return labels_of(texts, ends, torch.from_numpy(row), torch.from_numpy(self.place[positions]), heads)


@dataclass(frozen=True)
class EncoderStates:
    """Last states of an encoder along sources, each kept once however many texts follow it.

    Attributes:
        states: shape (tokens, h), float16, in a file.
        starts: where each source begins there, and the end, shape (sources + 1,), int64.
        source: number of each text's source, shape (texts,), int64; -1 for one whose states are not kept.
    """

    states: np.ndarray
    starts: np.ndarray
    source: np.ndarray

    def of_texts(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """States of the sources of some texts, padded behind, shape (n, longest, h), and their mask, (n, longest)."""
        numbers = self.source[rows]
        parts = [torch.from_numpy(self.states[self.starts[n] : self.starts[n + 1]].copy()) for n in numbers]
        masks = [torch.ones(len(part), dtype=torch.int64) for part in parts]
        states, mask = (nn.utils.rnn.pad_sequence(some, batch_first=True) for some in (parts, masks))
        return states, mask


@dataclass(frozen=True, kw_only=True)
class PairedStates(Positions):
    """States of a draft and its target at every position from which the target wrote a token.

    Attributes:
        draft: states of the draft after its final norm, shape (positions, draft width), float16, in a file.
        target: states of the target, shape (positions, target width), likewise.
        digest: hash of everything that they depend on, 64 hex digits.
    """

    draft: np.ndarray
    target: np.ndarray
    digest: str

    @property
    def written(self) -> np.ndarray:
        """The token that the target wrote from each position, shape (positions,), int32."""
        return self.text.tokens[self.row, self.place + 1]

    def of_draft(self, positions: np.ndarray) -> Tensor:
        """States of the draft, shape (m, draft width), float32."""
        return torch.from_numpy(self.draft[positions].astype(np.float32))

    def of_target(self, positions: np.ndarray) -> Tensor:
        """States of the target, shape (m, target width), float32."""
        return torch.from_numpy(self.target[positions].astype(np.float32))


class Chained:
    """Arrays of states, shape (positions, h), one behind the other, read on access and never copied together."""

    def __init__(self, parts: Sequence[np.ndarray | Chained]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        """Number of positions."""
        return int(self._ends[-1])

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The states at some positions, shapes (n,) to (n, h)."""
        part_of = np.searchsorted(self._ends, positions, side="right")
        chosen = [np.flatnonzero(part_of == number) for number in range(len(self._parts))]
        starts = np.concatenate([[0], self._ends])
        states = [part[positions[rows] - start] for part, rows, start in zip(self._parts, chosen, starts, strict=False)]
        return np.concatenate(states)[np.argsort(np.concatenate(chosen))]


def labels_of(texts: Tensor, ends: Tensor, row: Tensor, place: Tensor, heads: int) -> Tensor:
    """Tokens that heads should predict from some positions: the one after the next, and those that follow it.

    Args:
        texts: token ids, shape (texts, width), int64.
        ends: tokens of each text, shape (texts,), int64.
        row, place: text and place of each position, shape (n,), int64.
        heads: number of heads.

    Returns:
        Shape (heads, n), int64; `IGNORED` behind the end of a text.
    """
    predicted = place + 2 + torch.arange(heads, device=texts.device)[:, None]
    return torch.where(predicted < ends[row], texts[row, predicted.clamp(max=texts.shape[1] - 1)], IGNORED)


def hidden_states(model: PreTrainedModel, text: TargetText, batch: int = 16, bfloat16: bool = False) -> HiddenStates:
    """States at the positions that heads predict from; computed, ``batch`` rows at a time, or read from their file.

    With ``bfloat16``, matrices are multiplied in that type, as `whole_states` says.

    Raises:
        FitError: no position has anything to predict; or as for `whole_states`.
    """
    first = np.maximum(text.prompts - 2, 0)
    last = np.where(text.side == SPEED, 0, text.ends - 2)  # the side whose speed is measured needs none
    row, place = _between(first, last)
    if not len(row):
        raise FitError("the target ends every text at once, so there is nothing to learn: give other text")
    states = _states_along(f"hidden{'-bfloat16' * bfloat16}", model, text, first, last, batch, bfloat16)
    return HiddenStates(text=text, row=row, place=place, states=states)


def whole_states(model: PreTrainedModel, text: TargetText, bfloat16: bool, batch: int = 16) -> HiddenStates:
    """States at every position of every text, the last included: for drafts, which need no labels.

    With ``bfloat16``, matrices are multiplied as in training: much quicker on processors that can, and far nearer to
    the target's distribution than a draft comes.

    Raises:
        FitError: the disk is too small, a state is not finite in float16, or the file is damaged.
    """
    first = np.zeros_like(text.ends)
    row, place = _between(first, text.ends)
    states = _states_along(f"whole{'-bfloat16' * bfloat16}", model, text, first, text.ends, batch, bfloat16)
    return HiddenStates(text=text, row=row, place=place, states=states)


def states_after_sources(model: PreTrainedModel, text: TargetText, batch: int = 16) -> HiddenStates:
    """States at the positions from which a model with an encoder wrote texts to train on, and those of its encoder.

    Raises:
        FitError: nothing was written; or as for `whole_states`.
    """
    first, last = text.prompts - 1, np.where(text.side == TRAINING, text.ends - 1, 0)
    row, place = _between(first, last)
    if not len(row):
        raise FitError("the target wrote nothing: give more --new-tokens, or other text")
    encoder = _encoder_states(model, text, batch)
    # The folder is that of the first of several texts, which may be joined with others another time.
    states = _states_along(f"decoder-{text.digest[:16]}", model, text, first, last, batch)
    return HiddenStates(text=text, row=row, place=place, states=states, encoder=encoder)


def _encoder_states(model: PreTrainedModel, text: TargetText, batch: int) -> EncoderStates:
    numbers, source = dict[tuple[int, ...], int](), np.full(len(text.ends), -1, dtype=np.int64)
    training = np.flatnonzero(text.side == TRAINING)
    source[training] = [numbers.setdefault(tuple(row), len(numbers)) for row in text.sources_of(training) or ()]
    rows = list(numbers)
    starts = np.cumsum([0, *map(len, rows)])
    encoder: Any = model.get_encoder()

    @torch.inference_mode()
    def fill(states: np.ndarray) -> None:
        for start in tqdm(range(0, len(rows), batch), unit="batch", mininterval=5.0, desc="states of the encoder"):
            members = rows[start : start + batch]
            inputs = reading(torch.empty(0, dtype=torch.int64, device=model.device), members)
            del inputs["decoder_input_ids"]
            computed = encoder(**inputs, return_dict=True)[0][inputs["attention_mask"].bool()]
            part = states[starts[start] : starts[start + len(members)]]
            part[:] = computed.to(torch.float16).cpu().numpy()
            require_finite(part, model)

    shape = int(starts[-1]), int(encoder.config.hidden_size)
    return EncoderStates(kept_states(text.folder / f"encoder-{text.digest[:16]}.npy", shape, fill), starts, source)


def last_states(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """States that a model's output layer reads along texts, shape (n, m, h), with their gradient."""
    states: list[Tensor] = []

    def look(_: nn.Module, read: tuple[Tensor, ...]) -> tuple[Tensor]:
        states.append(read[0])
        return (read[0][:, :1],)  # scores of all positions are not needed, and many

    handle = output_module(model).register_forward_pre_hook(look)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return states[-1]


def paired_states(draft: PreTrainedModel, target: PreTrainedModel, text: TargetText) -> PairedStates:
    """States of a draft and of the target that wrote the text; computed, or read from their files.

    Raises:
        FitError: nothing was written; or as for `whole_states`.
    """
    first, last = np.maximum(text.prompts - 1, 0), text.ends - 1
    row, place = _between(first, last)
    if not len(row):
        raise FitError("the target wrote nothing: give more --new-tokens")
    models = (draft, target)
    names = [hashlib.sha256(f"{weights_digest(model)} {model.dtype}".encode()).hexdigest() for model in models]
    of_draft, of_target = (
        _states_along(f"states-{name[:16]}", model, text, first, last, 16)
        for name, model in zip(names, models, strict=True)
    )
    digest = hashlib.sha256(" ".join([text.digest, *names]).encode()).hexdigest()
    return PairedStates(text=text, row=row, place=place, draft=of_draft, target=of_target, digest=digest)


def join_states(parts: Sequence[HiddenStates]) -> HiddenStates:
    """States of several texts of one target as those of one text, with the rows of the first part first."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.text.ends) for part in parts[:-1])])
    return HiddenStates(
        text=join_texts([part.text for part in parts]),
        row=np.concatenate([part.row + start for part, start in zip(parts, starts, strict=True)]),
        place=np.concatenate([part.place for part in parts]),
        states=Chained([part.states for part in parts]),
    )


def _between(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and place of every position from ``first`` up to ``last``, row by row; shapes (texts,) to (positions,)."""
    counts = np.maximum(last - first, 0)
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, first[row] + within


def _states_along(
    name: str,
    model: PreTrainedModel,
    text: TargetText,
    first: np.ndarray,
    last: np.ndarray,
    batch: int,
    bfloat16: bool = False,
) -> np.ndarray:
    """States after the final norm in the order of `_between`, shape (positions, h), float16, mapped from a file."""
    counts = np.maximum(last - first, 0)
    shape = int(counts.sum()), output_layer(model).weight.shape[1]

    def fill(states: np.ndarray) -> None:
        _compute(states, model, text, first, counts, batch, bfloat16)

    return kept_states(text.folder / f"{name}.npy", shape, fill)


def kept_states(path: Path, shape: tuple[int, int], fill: Callable[[np.ndarray], object]) -> np.ndarray:
    """Hidden states mapped from a file, float16, which is written first where it is not there.

    Args:
        path: of the file, ``.npy``.
        shape: positions, and numbers of each.
        fill: computes the states into an array of that shape.

    Raises:
        FitError: the disk is too small, or the file is damaged.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = 2 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
        if needed > free:
            raise FitError(
                f"the hidden states need {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free: "
                "make room, give --work, or generate fewer --texts"
            )
        with replacing(path) as temporary:
            states = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
            fill(states)
            states.flush()
            del states
    try:
        stored: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if stored.shape != shape:
            raise ValueError(f"it has shape {stored.shape} instead of {shape}")
    except (OSError, ValueError) as error:
        raise FitError(f"{path} is damaged ({error}): remove it to compute it again") from error
    return stored


@torch.inference_mode()
def _compute(
    states: np.ndarray,
    model: PreTrainedModel,
    text: TargetText,
    first: np.ndarray,
    counts: np.ndarray,
    batch: int,
    bfloat16: bool,
) -> None:
    """Fill ``states``."""
    rows, done = np.flatnonzero(counts), 0
    for start in tqdm(range(0, len(rows), batch), unit="batch", mininterval=5.0, desc="hidden states"):
        members = rows[start : start + batch]
        width = int((first + counts)[members].max())
        ids = torch.from_numpy(text.tokens[members, :width].astype(np.int64)).to(model.device)
        # Padding stands behind a row, where a causal model does not look.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            computed = last_states(model, reading(ids, text.sources_of(members))).to(torch.float16).cpu().numpy()
        for member, of_row in zip(members, computed, strict=True):
            part = of_row[first[member] : first[member] + counts[member]]
            require_finite(part, model)
            states[done : done + len(part)] = part
            done += len(part)


def require_finite(states: np.ndarray, model: PreTrainedModel) -> None:
    """Refuse hidden states of a model that are NaN or too large for float16.

    Raises:
        FitError: some are.
    """
    if np.isfinite(states).all():
        return
    kind = str(model.dtype).removeprefix("torch.")
    way_out = "choose another model"
    raise FitError(
        f"{model.name_or_path or type(model).__name__} in {kind} has hidden states that are NaN or above "
        f"{np.finfo(np.float16).max:,.0f}, the largest number of the float16 in which they are kept: "
        + (way_out if model.dtype == torch.float32 else f"give --dtype float32, or {way_out}")
    )
