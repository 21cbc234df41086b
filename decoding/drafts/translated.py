"""A draft model that reads and proposes its target's tokens, whatever its own are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import VocabularyMismatchError
from ..models.encoder.encoder_decoder import EncoderDecoder
from ..models.kv_cache import TokenTree
from ..models.language_model import LanguageModel
from ..models.output_layer import Logits
from .translation import Translation


class TranslatedModel(LanguageModel):
    """A draft model in its target's vocabulary: lengths, trees and scores are those of the target's tokens.

    A token that the draft lacks is read as several of its own. What it has read stays in its cache, so that every round
    costs it no more than the tokens that are new.

    Args:
        inner: the draft, with a vocabulary of its own.
        translation: between the two.

    Raises:
        VocabularyMismatchError: the draft has an encoder, to which the source cannot be told.
    """

    def __init__(self, inner: LanguageModel, translation: Translation) -> None:
        if isinstance(inner, EncoderDecoder):
            raise VocabularyMismatchError(
                f"draft {inner.name} has an encoder and other tokens than the target, whose source it could not read. "
                "Choose a draft with the target's tokenizer, or prompt lookup."
            )
        # Nothing of the model is tried again: `inner` has done so.
        vars(self).update({name: value for name, value in vars(inner).items() if not name.startswith("_")})
        self._inner = inner.fresh()
        self.translation = translation
        self.vocabulary_size = translation.target.rows
        self._ends: list[int] = []  # tokens of the draft up to and with each of the target's
        self._last_start = 0

    def __getattr__(self, name: str) -> Any:
        """Everything else is as in the draft."""
        if name == "_inner":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._inner, name)

    def fresh(self) -> LanguageModel:
        """Share the weights, with an empty cache."""
        return TranslatedModel(self._inner, self.translation)

    @property
    def length(self) -> int:
        """Number of the target's tokens in the cache."""
        return len(self._ends)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of the tokens in the cache."""
        return self._inner.cache_bytes

    def room(self, text: Sequence[int]) -> int:
        """Tokens that can still be read after a text whose beginning is in the cache; negative if it is too long."""
        unread = map(len, self.translation.spell(text[self.length :], not self.length))
        return self._inner.context_limit - self._end(self.length) - sum(unread)

    def forward(
        self,
        tokens: Tensor,
        tree: TokenTree | None = None,
        *,
        last: int | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Logits:
        """Read tokens of the target. Arguments, results and errors as for `LanguageModel.forward`.

        Waits for the device, unless the draft has all the target's tokens.
        """
        count = tokens.shape[0]
        start = self.length if tree is None else self.length + count - len(tree)
        if self.translation.complete:
            sizes, spelled = [1] * count, self.translation.one_to_one(tokens)
        else:
            pieces = self.translation.spell(tokens.tolist(), not self.length)
            sizes, spelled = [len(part) for part in pieces], torch.tensor([p for part in pieces for p in part])
        if tree is not None:
            known = [self._end(place + 1) - self._end(place) for place in range(start, self.length)]
            tree = _spelled_tree(tree, [*known, *sizes])
        if len(spelled) > count:  # the score of a token is that of its last piece
            ends = torch.tensor(sizes).cumsum(0) - 1
            rows = (ends if last is None else ends[-last:]) if rows is None else ends[rows.cpu()]
            last, rows = None, rows.to(self._inner.device)
        output = self._inner.forward(spelled.to(self._inner.device), tree, last=last, rows=rows, hidden=hidden)
        self._grow(sizes)
        self._last_start = start
        return Logits(self.translation.scores(output.scores), output.hidden)

    def read(self, tokens: Sequence[int], *, hidden: bool = False, of: int | None = None) -> Tensor | None:
        """Append a text to the cache, in parts. Arguments, results and errors as for `LanguageModel.read`."""
        pieces = self.translation.spell(tokens, not self.length)
        spelled = [piece for part in pieces for piece in part]
        whole = None if of is None else self._end(self.length) + len(spelled) + of - self.length - len(tokens)
        state = self._inner.read(spelled, hidden=hidden, of=whole)
        self._grow([len(part) for part in pieces])
        return state

    def keep(self, path: Sequence[int]) -> None:
        """Keep only the tokens (or tree nodes) in `path`, ascending, from the last forward pass; drop the rest."""
        first = self._end(self._last_start)
        spans = [(self._end(self._last_start + place), self._end(self._last_start + place + 1)) for place in path]
        self._inner.keep([piece - first for begin, end in spans for piece in range(begin, end)])
        del self._ends[self._last_start :]
        self._grow([end - begin for begin, end in spans])

    def truncate(self, length: int) -> None:
        """Forget every token of the target from position `length` on."""
        if length < self.length:
            self._inner.truncate(self._end(length))
            del self._ends[length:]

    def _grow(self, sizes: Sequence[int]) -> None:
        """Note what was read: so many tokens of the draft for each of the target's."""
        end = self._end(self.length)
        self._ends += [end + size for size in accumulate(sizes)]

    def _end(self, length: int) -> int:
        """Tokens of the draft in the first ones of the target."""
        return self._ends[length - 1] if length else 0


def _spelled_tree(tree: TokenTree, sizes: Sequence[int]) -> TokenTree:
    """A tree in which every node is a chain of so many."""
    if max(sizes, default=1) == 1:
        return tree
    ends = list(accumulate(sizes))
    parents: list[int] = []
    for parent, size in zip(tree.parents, sizes, strict=True):
        parents += [ends[parent] - 1 if parent >= 0 else -1, *range(len(parents), len(parents) + size - 1)]
    return TokenTree(parents)
