"""An EAGLE head as the draft of trees: it reads a level of candidates at a time, as draft models do.

Li et al., "EAGLE-2" (arXiv 2406.16858). A candidate is read with the head's own state at its parent; what was accepted
is read again with the states that the target has of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...models.kv_cache import PreallocatedLayer, TokenTree
from ...models.language_model import LanguageModel
from ...models.output_layer import Logits
from .drafter import PART, EagleDrafter
from .target import StatesTarget


class HeadInTrees(LanguageModel):
    """A head with the methods of a model that drafts trees, in the text of its target alone (`within`).

    Args:
        drafter: of the pair.
    """

    def __init__(self, drafter: EagleDrafter) -> None:
        head = drafter.head
        self._drafter, self._head, self._passes = drafter, head, drafter.passes
        self.model = cast(Any, head)
        self.name, self.vocabulary_size, self.hidden_size = head.name, drafter.vocabulary_size, head.shape.hidden_size
        self.device, self.dtype = head.norm.weight.device, head.norm.weight.dtype
        self.context_limit = drafter.context_limit
        self.mask_seconds = 0.0
        self._target: StatesTarget | None = None
        self._forget()

    def _forget(self) -> None:
        self._cache: Any = PreallocatedLayer()
        self._read: list[int] = []  # of the text, candidates not counted
        self._nodes: list[Tensor] = []  # the head's states at candidates, each of shape (1, h)
        self._end: Tensor | None = None
        self._sure = 0

    def within(self, target: LanguageModel) -> HeadInTrees:
        """Return the head for a text that a target reads. Errors as for `EagleDrafter.beside`."""
        near = copy.copy(self)
        near._target = self._drafter.beside(target).target
        return near

    def fresh(self) -> LanguageModel:
        """Share the weights, with an empty cache, in the same text of the target."""
        other = copy.copy(self)
        other._forget()
        return other

    @property
    def length(self) -> int:
        """Number of tokens of the text, and candidates behind it, that were read."""
        return len(self._read) + len(self._nodes)

    def room(self, text: Sequence[int]) -> int:
        """Tokens that can still be read after a text; negative before the target has read any of it."""
        known = self._target is not None and self._target.states.length > 0 and len(text) > 1
        return self.context_limit - len(text) if known else -1

    def read(self, tokens: Sequence[int], *, hidden: bool = False, of: int | None = None) -> Tensor | None:
        """Append tokens that the target has read, but the last, which it may read later."""
        self._read += list(tokens)
        self._catch_up()
        return None

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        tree: TokenTree | None = None,
        *,
        last: int | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Logits:
        """Read the end of a text, or the last nodes of a growing tree behind it.

        Args:
            tokens: shape (tokens,).
            tree: None for the text, for whose last token alone there are scores.
            last: as many as there are nodes, or 1.
            rows: None.
            hidden: return the states too, after the norm.
        """
        if tree is None:
            self._read += tokens.tolist()
            self._nodes = []
            scores = self._catch_up()
            states = self._end
        else:
            scores, states = self._read_nodes(tokens, tree)
        assert scores is not None
        assert states is not None
        return Logits(scores, self._head.norm(states) if hidden else None)

    def keep(self, path: Sequence[int]) -> None:
        """Forget all candidates: those that were accepted are read again, with states of the target."""
        self._nodes = []
        self._cache.cut(self._sure)

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self.keep(())
        del self._read[length:]
        if self._sure > max(0, length - 1):
            self._sure, self._end = max(0, length - 1), None
        self._cache.cut(self._sure)

    def _catch_up(self) -> Tensor | None:
        """Read the positions of the text that are new; scores of the token after it, shape (1, vocabulary)."""
        assert self._target is not None
        scores, known = None, min(self._target.states.length, len(self._read) - 1)
        while self._sure < known:
            end = min(known, self._sure + PART)
            states = self._target.states.between(self._sure, end)
            tokens = torch.tensor(self._read[self._sure + 1 : end + 1], device=states.device)
            self._end, scores = self._passes.read(tokens, states, self._sure, self._cache)
            self._sure = end
        return scores

    def _read_nodes(self, tokens: Tensor, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """Scores and states of the last nodes of a tree, shapes (n, vocabulary) and (n, h)."""
        assert self._end is not None
        new = tree.parents[-tokens.shape[0] :]
        before = torch.cat([self._end if parent < 0 else self._nodes[parent] for parent in new])
        hidden, scores = self._passes.branch(tokens, before, tree, self._sure, self._cache)
        self._nodes += hidden.split(1)
        return scores, hidden
