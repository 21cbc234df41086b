"""Toy models that are tables, so that what they say is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from specgym.decoding.models.kv_cache import TokenTree
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.output_layer import Logits


class TableModel(LanguageModel):
    """A language model whose logits are a table by the last two tokens, so that its distribution is known exactly.

    Args:
        table: logits, shape (vocabulary, vocabulary, vocabulary): the token before the last, the last, the next.
            Before the first token stands token 0.
        eos: token ids that end a text.
        context: the context limit.
        name: how messages call it.
    """

    def __init__(
        self, table: Tensor, *, eos: Sequence[int] | None = None, context: int = 10_000, name: str = "table"
    ) -> None:
        self.table = table
        self.name = name
        self.vocabulary_size = table.shape[-1]
        self.context_limit = context
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        ends: Any = SimpleNamespace(eos_token_id=eos)
        self.model: Any = SimpleNamespace(config=ends, generation_config=ends)
        self.mask_seconds = 0.0
        self.seen: list[int] = []
        self._last_start = 0

    def fresh(self) -> TableModel:
        """Copy of the table that has read nothing."""
        other = TableModel.__new__(TableModel)
        other.__dict__.update(self.__dict__)
        other.seen = []
        other._last_start = 0
        return other

    @property
    def length(self) -> int:
        """Tokens read."""
        return len(self.seen)

    def forward(
        self,
        tokens: Tensor,
        tree: TokenTree | None = None,
        *,
        last: int | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Logits:
        """Rows of the table; a node of a tree has its parent before it."""
        assert not hidden
        start = self.length if tree is None else self.length + tokens.shape[0] - len(tree)
        self.seen += tokens.tolist()
        nodes = self.seen[start:]
        assert start + (len(nodes) if tree is None else tree.height) <= self.context_limit
        parents = range(-1, len(nodes) - 1) if tree is None else tree.parents
        root = self.seen[start - 1] if start else 0
        before = [nodes[parent] if parent >= 0 else root for parent in parents]
        self._last_start = start
        scores = self.table[before, nodes][len(nodes) - tokens.shape[0] :]
        if rows is not None:
            return Logits(scores[rows], None)
        return Logits(scores if last is None else scores[-last:], None)

    def truncate(self, length: int) -> None:
        """Forget what was read from `length` on."""
        del self.seen[length:]

    def keep(self, path: Sequence[int]) -> None:
        """Keep only these nodes of the last tree."""
        assert list(path) == sorted(set(path))
        self.seen[self._last_start :] = [self.seen[self._last_start + node] for node in path]


class ReadableTable(LanguageModel):
    """A `TableModel` whose last hidden states are its logits, and whose output layer changes nothing."""

    def __init__(self, table: TableModel) -> None:
        self._table = table
        self.name = table.name
        self.vocabulary_size = self.hidden_size = table.vocabulary_size
        self.context_limit, self.device, self.dtype = table.context_limit, table.device, table.dtype
        self.mask_seconds = 0.0
        layer = nn.Linear(self.hidden_size, self.vocabulary_size, bias=False)
        nn.init.eye_(layer.weight)
        self.model = table.model
        vars(table.model)["get_output_embeddings"] = lambda: layer

    def fresh(self) -> ReadableTable:
        """Copy of the table that has read nothing."""
        return ReadableTable(self._table.fresh())

    @property
    def length(self) -> int:
        """Tokens read."""
        return self._table.length

    def forward(
        self,
        tokens: Tensor,
        tree: TokenTree | None = None,
        *,
        last: int | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Logits:
        """Rows of the table, twice if hidden states are wanted."""
        scores = self._table.forward(tokens, tree, last=last, rows=rows).scores
        return Logits(scores, scores if hidden else None)

    def keep(self, path: Sequence[int]) -> None:
        """Keep only these nodes of the last tree."""
        self._table.keep(path)

    def truncate(self, length: int) -> None:
        """Forget what was read from `length` on."""
        self._table.truncate(length)


def random_table(vocabulary: int, seed: int, spread: float = 1.0) -> Tensor:
    """Logits for a `TableModel`."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)


def readable_table(vocabulary: int, seed: int, spread: float = 1.0) -> ReadableTable:
    """Over a `random_table`."""
    return ReadableTable(TableModel(random_table(vocabulary, seed, spread)))


def rehearsed_table(vocabulary: int, text: Sequence[int]) -> TableModel:
    """A draft that knows a text, but thinks another token a little likelier where a third of all pairs were read."""
    table = torch.zeros(vocabulary, vocabulary, vocabulary)
    for before, last, following in zip(text, text[1:], text[2:], strict=False):
        if not table[before, last].any():
            table[before, last, following] = 9.0
            if (before + last) % 3 == 0:
                table[before, last, (following + 1) % vocabulary] = 9.5
    return TableModel(table)
