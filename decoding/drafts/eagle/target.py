"""A target that keeps the hidden states of some of its layers along its text, for a head to read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...models.captured import CapturedPasses
from ...models.early_exit import part_of, stack_of, whole
from ...models.joint.joining import AT_WORK
from ...models.kv_cache import TokenTree
from ...models.language_model import LanguageModel
from ...models.output_layer import Logits

_STRUCTURE = (
    "an EAGLE head reads the hidden states of a plain stack of decoder layers, all with full attention: "
    "model.model.embed_tokens, .layers and .norm, and an lm_head, such as Llama's, Qwen2's or Mistral's. Choose "
    "another draft"
)
_FIRST_CAPACITY = 256


class Tap(nn.Module):
    """In the place of a decoder layer: the layer, and what it was given.

    Args:
        layer: of a model.

    Attributes:
        states: what it was given last, shape (1, tokens, h).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.training = layer, layer.training
        self.states: Tensor | None = None

    def forward(self, states: Tensor, *arguments: object, **named: object) -> object:
        """Keep the states, and do what the layer does."""
        self.states = states
        return self.layer(states, *arguments, **named)

    def emptied(self) -> Tensor:
        """Return what the layer was given last, which is then forgotten here."""
        states, self.states = self.states, None
        assert states is not None
        return states


class StatesStore:
    """Hidden states of the tokens that a target has read, in storage that doubles when full.

    Attributes:
        length: tokens.
    """

    def __init__(self) -> None:
        self.length = 0
        self._stored: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the states of the tokens, without what is held ready for more."""
        return 0 if self._stored is None else self.length * self._stored[0].nbytes

    def add(self, start: int, states: Tensor) -> None:
        """Put the states of a pass, shape (tokens, width), behind those of the first ``start`` tokens."""
        end = start + states.shape[0]
        if self._stored is None or self._stored.shape[0] < end:
            capacity = max(_FIRST_CAPACITY, 1 << (end - 1).bit_length())
            grown = states.new_empty(capacity, states.shape[1])
            if self._stored is not None:
                grown[: self._stored.shape[0]] = self._stored
            self._stored = grown
        self._stored[start:end] = states
        self.length = end

    def between(self, start: int, end: int) -> Tensor:
        """States of some tokens, shape (end - start, width)."""
        assert self._stored is not None
        return self._stored[start:end]

    def gather(self, start: int, rows: Sequence[int]) -> None:
        """Keep tokens ``start + rows`` (ascending), moved down to ``start``; forget the others from ``start`` on."""
        if self._stored is not None and list(rows) != list(range(len(rows))):
            index = torch.tensor(rows, device=self._stored.device) + start
            self._stored[start : start + len(rows)] = self._stored[index]
        self.length = min(self.length, start + len(rows))


class StatesTarget(LanguageModel):
    """A target that keeps the states which a head reads, for the tokens in its cache.

    Args:
        target: as it reads by itself.
        layers: of the target, counted from 0, whose input is kept; ascending.

    Attributes:
        whole: the target as given.
        layers: as given.
        states: of the text.

    Raises:
        UnsupportedModelError: the target is no plain stack of layers, or gives other scores in this way.
    """

    states: StatesStore

    def __init__(self, target: LanguageModel, layers: Sequence[int]) -> None:
        vars(self).update(vars(target))
        self.whole, self.layers = target, tuple(layers)
        stack = stack_of(target, "keep its hidden states for an EAGLE head", _STRUCTURE)
        places = {place: Tap(layer) if place in self.layers else layer for place, layer in enumerate(stack)}
        self._taps = [cast(Tap, places[layer]) for layer in self.layers]
        tapped = part_of(target.model, places.values())
        self._unread = LanguageModel.as_read(tapped, target._reading)
        if target.captured is not None:
            self._unread.captured = CapturedPasses(tapped, target.masks.masks, self._kept)
        self.captured = self._unread.captured
        self._unread.kept = self._kept
        self._forget()
        self._try()

    def fresh(self) -> StatesTarget:
        """Share the weights, with an empty cache; a text of a batch is read with others."""
        other = cast(StatesTarget, super().fresh())
        text = AT_WORK.get()
        other._reader._joined = None if text is None else text.joined(other._reader)
        return other

    def _kept(self) -> Tensor:
        """States of the last pass, those of the layers one behind the other, shape (texts, tokens, layers * h)."""
        return torch.cat([tap.emptied() for tap in self._taps], -1)

    def _forget(self) -> None:
        super()._forget()
        self.states = StatesStore()
        self._reader = copy.copy(self._unread)
        self._reader._cache = self._cache

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and kept states of the tokens in the cache."""
        return super().cache_bytes + self.states.nbytes

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        super().truncate(length)
        self.states.length = min(self.states.length, length)

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """Keep only the tokens (or tree nodes) in `path`, ascending, from the last forward pass; drop the rest."""
        super().keep(path)
        self.states.gather(self._last_start, path)

    def _pass(
        self, tokens: Tensor, tree: TokenTree | None, start: int, last: int | None, rows: Tensor | None, hidden: bool
    ) -> Logits:
        first = self._cache.length  # behind a growing tree's first nodes, which are there
        result = self._reader._pass(tokens, tree, start, last, rows, hidden)
        self.mask_seconds, self._cache = self._reader.mask_seconds, self._reader._cache
        joined = self._reader._joined
        if joined is not None and joined.kept is not None:
            kept, joined.kept = joined.kept, None
        else:
            kept = (self._kept() if self.captured is None else self.captured.emptied())[0]
        self.states.add(first, kept)
        return result

    def _try(self) -> None:
        """Refuse a model that gives other scores by a part of it."""
        tokens = (7 * torch.arange(1, 7, device=self.device)) % self.vocabulary_size
        expected = self.whole.fresh().forward(tokens).scores
        scores = self.fresh().forward(tokens).scores
        if not torch.equal(scores, expected):
            raise UnsupportedModelError(f"the hidden states of {self.name} cannot be read on the way: {_STRUCTURE}")


def keeping_states(target: LanguageModel, layers: Sequence[int]) -> StatesTarget:
    """Return a target as it keeps the input of some layers; as it is if it does so. Errors as for `StatesTarget`."""
    if isinstance(target, StatesTarget) and target.layers == tuple(layers):
        return target
    return StatesTarget(whole(target), layers)
