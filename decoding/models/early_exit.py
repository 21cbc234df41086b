"""Early exit: the first layers of a target, with its final norm and output layer, as a draft of the whole.

Elhoushi et al., "LayerSkip" (arXiv 2404.16710), who train a model for it; Zhang et al., "Draft & Verify" (arXiv
2309.08168), who skip layers of a model as it is. The layers are the target's own modules, and along a text they are
computed once: drafting leaves keys and values in the target's cache, and hidden states, from which verification goes on
through the other layers. For that a model has to be a plain stack of decoder layers; whether it is one is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError, whole_number
from .kv_cache import BranchingCache, PreallocatedLayer, TokenTree
from .language_model import LanguageModel
from .output_layer import Logits
from .trial import FAILURES, closeness

NAME = "early-exit"
_STRUCTURE = (
    "an early exit takes a plain stack of decoder layers, all with full attention: model.model.embed_tokens, .layers "
    "and .norm, and an lm_head, such as Llama's, Qwen2's or Mistral's. Choose another draft"
)


class _Tap(nn.Module):
    """In the place of the final norm: the norm, and what it was given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.states: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        self.states = states
        return cast("Tensor", self.norm(states))

    def emptied(self) -> Tensor:
        """Hidden states of the last pass, shape (tokens, hidden size), which are then forgotten here."""
        states, self.states = self.states, None
        assert states is not None
        return states[0]


class _Resumption(nn.Module):
    """In the place of the embeddings: hidden states that lower layers have computed of the tokens."""

    states: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.states is not None
        assert self.states.shape[0] == tokens.shape[1]
        return self.states.unsqueeze(0)


class _Ahead:
    """Tokens of a text that the lower layers have read and the upper ones have not.

    Attributes:
        start: tokens of the text before that.
        tokens: ids, shape (n,), int64.
        states: behind the lower layers, shape (n, hidden size); None without tokens.
    """

    def __init__(self) -> None:
        self.start = 0
        self.tokens = torch.empty(0, dtype=torch.int64)
        self.states: Tensor | None = None

    def add(self, start: int, tokens: Tensor, states: Tensor) -> None:
        """Append the tokens of a pass that began at a position."""
        if self.states is None:
            self.start, self.tokens, self.states = start, tokens, states
            return
        self.tokens, self.states = torch.cat([self.tokens, tokens]), torch.cat([self.states, states])

    def cut(self, length: int) -> None:
        """Forget every token from position `length` of the text on."""
        kept = max(0, length - self.start)
        if self.states is not None and kept < self.tokens.shape[0]:
            self.tokens, self.states = self.tokens[:kept], self.states[:kept] if kept else None

    def agreeing(self, tokens: Tensor) -> int:
        """Count the first of some tokens that are those here; waits for the device."""
        count = min(self.tokens.shape[0], tokens.shape[0]) if self.states is not None else 0
        return int((self.tokens[:count] == tokens[:count]).long().cumprod(0).sum()) if count else 0


def part_of(model: PreTrainedModel, layers: Iterable[nn.Module], **replaced: nn.Module) -> PreTrainedModel:
    """A model of some layers of another one, and other modules in the place of some; all else is the other's own."""
    inner = _shallow(model.base_model)
    for name, module in {"layers": nn.ModuleList(layers), **replaced}.items():
        module.training = False
        setattr(inner, name, module)
    outer: Any = _shallow(model)
    setattr(outer, model.base_model_prefix, inner)
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = len(inner.layers)
    inner.config = outer.config = config
    return cast("PreTrainedModel", outer)


def _shallow(module: nn.Module) -> Any:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


@dataclass(frozen=True)
class EarlyExit:
    """Request for a draft that is the first layers of whatever target it gets, with its norm and output layer.

    Attributes:
        layers: how many, 1 to those of the target less one.
    """

    layers: int


class ExitModel(LanguageModel):
    """The first layers of a target, with its norm and output layer, and its weights.

    By itself it is a language model like any other, with a cache of its own. As `ResumingTarget.exit` it reads the text
    of that target, in the target's cache.

    Args:
        target: whose layers these are.
        layers: how many, 1 to those of the target less one.

    Attributes:
        layers: how many.
        of: model whose layers they are.

    Raises:
        ArgumentError: the target has not so many layers.
        UnsupportedModelError: the target is not a plain stack of layers.
    """

    _ahead: _Ahead | None = None

    def __init__(self, target: LanguageModel, layers: int) -> None:
        stack = stack_of(target, "be left early", _STRUCTURE)
        self.layers = whole_number(f"{NAME} layers of {target.name}", layers, at_most=len(stack) - 1)
        self.of = target.model
        self._tap = _Tap(cast("nn.Module", target.model.base_model.norm))
        below = part_of(target.model, stack[: self.layers], norm=self._tap)
        self._set_up(below, target._reading)
        self.name = f"{NAME}:{layers}"

    def sharing(self, cache: BranchingCache, ahead: _Ahead) -> ExitModel:
        """Return the model as it reads a target's text, in the cache of the target."""
        other = copy.copy(self)
        other._cache, other._ahead = cache, ahead
        return other

    def within(self, target: LanguageModel) -> ExitModel:
        """Return the model for a text that a target reads: in the target's cache if it is the target's own exit."""
        exit_ = getattr(target, "exit", None)
        return exit_ if isinstance(exit_, ExitModel) and exit_.model is self.model else self

    def fresh(self) -> LanguageModel:
        """Share the weights, with an empty cache; in a target's text this is the model that reads it."""
        return self if self._ahead is not None else super().fresh()

    def read(self, tokens: Sequence[int], *, hidden: bool = False, of: int | None = None) -> Tensor | None:
        """Append a text to the cache, as `LanguageModel.read`; of a target's text the beginning is there already."""
        unread = tokens if self._ahead is None else tokens[self.length :]
        return super().read(unread, hidden=hidden, of=of) if len(unread) else None

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        super().truncate(length)
        if self._ahead is not None:
            self._ahead.cut(length)

    def _pass(
        self, tokens: Tensor, tree: TokenTree | None, start: int, last: int | None, rows: Tensor | None, hidden: bool
    ) -> Logits:
        result = super()._pass(tokens, tree, start, last, rows, hidden)
        states = self._tap.emptied()
        if self._ahead is not None:
            self._ahead.add(start, tokens, states)
        return result


class ResumingTarget(LanguageModel):
    """A target that goes on from what an early exit of it has computed along the same text.

    A pass over a chain begins behind the first layers, for the tokens that `exit` has read in the same order, and reads
    the rest of the chain through all layers. Any other pass is that of the model itself.

    Args:
        whole: the target.
        exit_: of it.

    Attributes:
        whole: as given.
        exit: the early exit, to draft in this text.

    Raises:
        UnsupportedModelError: the target gives other scores in this way; the message says why.
    """

    exit: ExitModel

    def __init__(self, whole: LanguageModel, exit_: ExitModel) -> None:
        vars(self).update(vars(whole))
        self.whole, self.captured = whole, None  # its layers have read differently far
        self._resumption = _Resumption()
        stack = stack_of(whole, "be left early", _STRUCTURE)
        above = part_of(whole.model, stack[exit_.layers :], embed_tokens=self._resumption)
        self._above = LanguageModel.as_read(above, whole._reading)
        self._unshared = exit_
        self._forget()
        self._try()

    def _forget(self) -> None:
        super()._forget()
        cache = cast("BranchingCache", self._cache)
        self._ahead = _Ahead()
        self.exit = self._unshared.sharing(cache, self._ahead)
        self._upper = copy.copy(self._above)
        self._upper._cache = cache

    @property
    def length(self) -> int:
        """Number of tokens that all layers have read."""
        layers = cast("list[PreallocatedLayer]", cast("BranchingCache", self._cache).layers)
        return layers[self.exit.layers].length if len(layers) > self.exit.layers else 0

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        super().truncate(length)
        self._ahead.cut(length)

    def _pass(
        self, tokens: Tensor, tree: TokenTree | None, start: int, last: int | None, rows: Tensor | None, hidden: bool
    ) -> Logits:
        known = self._ahead.agreeing(tokens) if tree is None else 0
        self.exit.truncate(self.length + known)
        if not known:
            return super()._pass(tokens, tree, start, last, rows, hidden)
        mask_seconds = 0.0
        if known < tokens.shape[0]:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            self.exit._pass(tokens[known:], None, start + known, None, nothing, False)
            mask_seconds = self.exit.mask_seconds
        self._resumption.states = self._ahead.states
        result = self._upper._pass(tokens, None, start, last, rows, hidden)
        self._resumption.states = None
        self._ahead.cut(0)
        self.mask_seconds = mask_seconds + self._upper.mask_seconds
        return result

    def _try(self) -> None:
        """Refuse a model that gives other scores when it goes on from the states behind some layers."""
        tokens = (7 * torch.arange(1, 7, device=self.device)) % self.vocabulary_size
        expected = self.whole.fresh().forward(tokens).scores
        problem = ""
        try:
            trial = cast("ResumingTarget", self.fresh())
            trial.forward(tokens[:2])
            trial.exit.forward(tokens[2:4])
            off = (trial.forward(tokens[2:]).scores - expected[2:]).abs().max() / expected.std().clamp(min=1e-6)
            if not off < closeness(self.dtype):
                problem = f"it gives other logits from there (off by {off:.2g} standard deviations)"
        except FAILURES as error:
            problem = f"it cannot do so ({type(error).__name__}: {error})"
        if problem:
            raise UnsupportedModelError(
                f"{self.name} cannot go on from the hidden states of its first {self.exit.layers} layers: {problem}; "
                f"{_STRUCTURE}"
            )


def resuming(target: LanguageModel, drafts: Sequence[LanguageModel]) -> LanguageModel:
    """Return a target as it goes on from the first of its early exits among some drafts; as it is without any.

    A second early exit is a draft like any other, with a cache of its own.
    """
    model = whole(target)
    exit_ = next((draft for draft in drafts if isinstance(draft, ExitModel) and draft.of is model.model), None)
    known = isinstance(target, ResumingTarget) and (exit_ is None or target.exit.model is exit_.model)
    return target if known or exit_ is None else ResumingTarget(model, exit_)


def whole(target: LanguageModel) -> LanguageModel:
    """Return a target as it reads by itself, with all its layers."""
    alone: LanguageModel = getattr(target, "whole", target)
    return alone


def stack_of(target: LanguageModel, use: str, structure: str) -> nn.ModuleList:
    """The decoder layers of a target.

    Raises:
        UnsupportedModelError: it is not a plain stack of layers.
    """
    model: Any = target.model
    inner = model.base_model if isinstance(model, PreTrainedModel) else None
    layers = getattr(inner, "layers", None)
    plain = (
        isinstance(layers, nn.ModuleList)
        and inner is not model
        and all(isinstance(getattr(inner, name, None), nn.Module) for name in ("norm", "embed_tokens"))
        and isinstance(model.get_output_embeddings(), nn.Module)
        and target.is_plain
    )
    # What accelerate moves around or replaces, it does by the modules that it was given.
    if not plain or any("forward" in vars(module) for module in (model, inner)):
        raise UnsupportedModelError(f"{target.name} ({type(model).__name__}) cannot {use}: {structure}")
    return cast("nn.ModuleList", layers)
