"""Passes of one model over several texts, each from a place of its own; the trial that they give what single passes do.

A pass has a row a text. Texts that read fewer tokens than others have them at the end of their rows; what is before
them is written behind the text, where it is overwritten or forgotten. Masks and positions say what each token sees,
as they do for trees, so no architecture is patched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..attention import Masks, rows_behind, side_by_side
from ..kv_cache import TokenTree
from ..output_layer import output_layer_watched
from ..trial import FAILURES, closeness
from .cache import JointCache, Slot, cache_of

if TYPE_CHECKING:  # which imports this module
    from ..language_model import LanguageModel

_LOG = logging.getLogger("specgym")


@dataclass(slots=True, eq=False)
class Request:
    """Tokens that a text wants read. The fields are the arguments of `LanguageModel.forward`, and:

    Attributes:
        slot: where the text's keys and values are.
        start: position of the tree or chain.
    """

    slot: Slot
    tokens: Tensor
    tree: TokenTree | None
    start: int
    last: int | None
    rows: Tensor | None
    hidden: bool


class Answer(NamedTuple):
    """Result of a request: that of a pass (`Logits`), and what the model keeps of it (`LanguageModel.kept`)."""

    scores: Tensor
    hidden: Tensor | None
    kept: Tensor | None
    """Shape (tokens, width)."""


class Source(NamedTuple):
    """Text that an encoder is to read, for a text of its own."""

    prompt: Sequence[int]
    states: Tensor | None
    """Hidden states that an equal encoder made of it, shape (1, source, hidden size); None if there are none yet."""


class Begun(NamedTuple):
    """Source that was read."""

    states: Tensor
    """Shape (1, source, hidden size)."""
    parts: list[Tensor]
    """Keys and values of every layer of the decoder by turns, shape (1, heads, source, head size)."""


class Reader(Protocol):
    """Model, or part of one, that reads for several texts at once; those that wait for the smallest are served first.

    Attributes:
        size: about as many weights as it has.
    """

    size: int

    def read(self, requests: Any) -> Sequence[object]:
        """Answer the requests, in their order."""
        ...


class Inputs(NamedTuple):
    """Texts of a joint pass, a row each."""

    slots: list[Slot]
    tokens: Tensor
    """Shape (texts, tokens), int64."""
    positions: Tensor
    """In the texts, shape (texts, tokens), int64."""
    mask: Masks
    stored: list[Tensor]
    """Storage of every layer, as for `StoredLayer`."""
    places: Tensor
    """Positions in the storage at which keys and values are written, shape (texts, tokens), int64."""

    @property
    def end(self) -> int:
        """Positions that the pass sees, at most."""
        mask = self.mask if isinstance(self.mask, Tensor) else next(iter(self.mask.values()))
        return mask.shape[-1]


class JoinedPasses:
    """Passes of one model over several texts.

    Args:
        model: of which the texts have copies.
        texts: rows for which storage is made at once.
        shapes: as for `JointCache`.

    Attributes:
        cache: of the texts.
        size: about as many weights as the layers have that write a text.
        beginnings: reads sources; None without an encoder.
    """

    beginnings: Reader | None = None

    def __init__(self, model: LanguageModel, texts: int = 1, shapes: Sequence[Tensor] = ()) -> None:
        self._model = model
        self._takes_rows = "logits_to_keep" in model.parameters
        self.cache = JointCache(texts, shapes)
        config = model.model.config.get_text_config(decoder=True)
        named = (getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers"))
        self.size = model.hidden_size**2 * next((layers for layers in named if isinstance(layers, int)), 1)

    @torch.inference_mode()
    def read(self, requests: Sequence[Request]) -> list[Answer]:
        """Read some tokens of every text; answers in the order of the requests."""
        self.cache.bring_together([request.slot for request in requests])
        model, order = self._model, sorted(range(len(requests)), key=lambda place: requests[place].slot.row)
        batch = [requests[place] for place in order]
        counts = [len(request.tokens) for request in batch]
        lengths = [request.slot.length for request in batch]
        count, end = max(counts), max(map(sum, zip(lengths, counts, strict=True)))
        # What is before a text's own tokens is written behind them.
        behind = np.arange(count) - (count - np.array(counts))[:, None]
        places_in_text = np.where(behind >= 0, behind, np.array(counts)[:, None] - 1 - behind)
        places = torch.from_numpy(places_in_text + np.array(lengths)[:, None]).to(model.device)
        tokens = _side_by_side([request.tokens for request in batch], count)
        positions, mask = self._seen(batch, behind, end)
        slots = [request.slot for request in batch]
        stored = self.cache.rows(slots, end + count)
        hidden = any(request.hidden for request in batch)
        last = 0 if any(request.rows is not None for request in batch) else _last_rows(batch)
        inputs = Inputs(slots, tokens, positions, mask, stored, places)
        outputs = self._pass(inputs, 0 if last == count else last, hidden)
        kept = None
        if model.kept is not None:
            kept = model.kept() if model.captured is None else model.captured.emptied()
        answers = [Answer(outputs[0], None, None)] * len(batch)
        for row, (place, request) in enumerate(zip(order, batch, strict=True)):
            scored: Any = slice(-(request.last or counts[row]), None)
            if request.rows is not None:
                scored = request.rows + (count - counts[row])
            answers[place] = Answer(
                outputs[0][row, scored].float(),
                outputs[1][row, scored] if request.hidden else None,
                None if kept is None else kept[row, count - counts[row] :],
            )
            request.slot.length += counts[row]
        return answers

    def _seen(self, batch: Sequence[Request], behind: np.ndarray[Any, Any], end: int) -> tuple[Tensor, Masks]:
        """Positions of the tokens, shape (texts, tokens), and what they see."""
        model, count = self._model, behind.shape[1]
        starts = np.array([request.start for request in batch])
        if all(request.tree is None for request in batch):
            inside = np.maximum(behind, 0) + starts[:, None]
            positions = torch.from_numpy(inside).to(model.device)
            if model.masks.full:
                return positions, rows_behind(positions, end, model.dtype)
        else:
            rows = []
            for request in batch:
                depths = torch.arange(len(request.tokens)) if request.tree is None else request.tree.depths
                depths = depths[-len(request.tokens) :] + request.start
                rows.append(torch.cat([depths[:1].expand(count - len(request.tokens)), depths]))
            positions = torch.stack(rows).to(model.device)
        masks = [model.masks.masks(request.tree, request.start, len(request.tokens)) for request in batch]
        return positions, side_by_side(masks, count, end)

    def _pass(self, inputs: Inputs, last: int, hidden: bool) -> Sequence[Tensor]:
        model = self._model
        if model.captured is not None:
            _, tokens, positions, mask, stored, places = inputs
            outputs = model.captured.run_rows(tokens, positions, mask, stored, places, last, hidden)
            if outputs is not None:
                return outputs
        started = time.perf_counter()
        with output_layer_watched(model.model, hidden) as states:
            scores = self._scores(inputs, last)
        if model.captured is not None:
            model.captured.took(time.perf_counter() - started)
        if not self._takes_rows and last:
            scores, states = scores[:, -last:], [state[:, -last:] for state in states]
        return [scores, *states[-1:]]

    def _scores(self, inputs: Inputs, last: int) -> Tensor:
        """Run the model; scores of the last tokens, or of all, shape (texts, tokens, vocabulary)."""
        arguments: dict[str, Any] = {
            "input_ids": inputs.tokens,
            "position_ids": inputs.positions,
            "attention_mask": inputs.mask,
        }
        if self._takes_rows:
            arguments["logits_to_keep"] = last
        cache = cache_of(inputs.stored, 0, inputs.end, inputs.places)
        scores: Tensor = self._model.model(**arguments, past_key_values=cache, use_cache=True).logits
        return scores

    def trial_texts(self, count: int) -> list[tuple[LanguageModel, LanguageModel]]:
        """Begin texts to try passes on, each twice: together with the others, and alone."""
        return [(self._model.fresh(), self._model.fresh()) for _ in range(count)]


def _last_rows(batch: Sequence[Request]) -> int:
    """Rows of scores, from the end, in which are all that are asked for."""
    return max(request.last or len(request.tokens) for request in batch)


def _side_by_side(tokens: Sequence[Tensor], count: int) -> Tensor:
    """Tokens of several texts, shape (texts, count), each text's at the end of its row."""
    if all(len(row) == count for row in tokens):
        return torch.stack(list(tokens))
    return torch.stack([torch.cat([row[:1].expand(count - len(row)), row]) for row in tokens])


def try_to_join(model: LanguageModel) -> Sequence[Tensor] | None:
    """Try whether a model gives the same scores of several texts in one pass as of each alone.

    Args:
        model: that is `joinable`; nothing is read with it.

    Returns:
        Keys and values of every layer by turns, of no position, for `JointCache`; None if the scores are others.
    """
    tokens = (5 * torch.arange(1, 13, device=model.device) + 1) % model.vocabulary_size
    shapes: list[tuple[Tensor, TokenTree | None]] = [
        (tokens[3:4], None),
        (tokens[5:8], TokenTree((-1, -1, 1)) if model.branches else None),
        (tokens[4:6], None),
    ]
    problem = ""
    try:
        passes, expected, requests = model.joint_passes(model), [], []
        for number, (text, alone) in enumerate(passes.trial_texts(len(shapes))):
            drafted, tree = shapes[number]
            for reader in (text, alone):
                reader.forward(tokens[: 2 + number])
            requests.append(Request(text.move_into(passes.cache), drafted, tree, text.length, None, None, False))
            expected.append(alone.forward(drafted, tree).scores)
        read = torch.cat([answer.scores for answer in passes.read(requests)])
        known = torch.cat(expected)
        off = (read - known).abs().max() / known.std().clamp(min=1e-6)
        if not off < closeness(model.dtype):
            problem = f"it gives other logits there (off by {off:.2g} standard deviations)"
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        _LOG.warning("%s reads the texts of a batch one after another, not in one pass: %s", model.name, problem)
        return None
    return [stored[:, :, :0].clone() for stored in passes.cache.stored]
