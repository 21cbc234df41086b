"""Heads without training to speak of, and toy targets whose hidden states heads can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from random_medusa_heads import random_heads
from specgym.decoding.medusa import MedusaHeads
from specgym.decoding.models import LanguageModel, Logits
from specgym.decoding.tree import TokenTree


def taught_heads(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], heads: int = 4, *, steps: int = 60, **more: Any
) -> MedusaHeads:
    """Heads that are often right about some texts: a few steps of training; `more` as for `random_heads`."""
    made = random_heads(model, heads, **{"spread": 0.05, **more})
    states, wanted = [], []
    for text in texts:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
        count = max(0, len(text) - heads - 1)
        states.append(hidden[:count])
        # The state of a token gives the next one to the target, and the one after that to the first head.
        wanted.append(torch.tensor([[text[place + 2 + head] for place in range(count)] for head in range(heads)]))
    inputs, labels = torch.cat(states), made.places_of(torch.cat(wanted, dim=1))
    optimiser = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(made(inputs).flatten(0, 1), labels.flatten()).backward()
        optimiser.step()
    return made.eval()


class ReadableTable(LanguageModel):
    """A `TableModel` whose last hidden states are its logits, and whose output layer changes nothing."""

    def __init__(self, table: LanguageModel) -> None:
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
        """The same table, nothing read."""
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
        """Of the last tree, keep these nodes alone."""
        self._table.keep(path)

    def truncate(self, length: int) -> None:
        """Forget what was read from `length` on."""
        self._table.truncate(length)


def scripted_heads(target: LanguageModel, rankings: Sequence[Sequence[int]]) -> MedusaHeads:
    """Heads of a `ReadableTable` that propose the same tokens everywhere: for each head, the likeliest first."""
    made = MedusaHeads.for_target(target.model, len(rankings))
    with torch.no_grad():
        for head, ranking in enumerate(rankings):
            for place, token in enumerate(ranking):  # far above any logit, and where SiLU changes nothing
                made.bias[0, head, token] = 1000.0 * (len(ranking) - place)
    return made.eval()


@pytest.fixture(scope="session")
def teach_heads() -> Callable[..., MedusaHeads]:
    """`taught_heads`."""
    return taught_heads


@pytest.fixture(scope="session")
def script_heads() -> Callable[..., MedusaHeads]:
    """`scripted_heads`."""
    return scripted_heads


@pytest.fixture(scope="session")
def make_readable(make_table: Callable[..., LanguageModel]) -> Callable[..., LanguageModel]:
    """A `ReadableTable` over what `make_table` makes of the arguments."""

    def make(*arguments: Any, **more: Any) -> LanguageModel:
        return ReadableTable(make_table(*arguments, **more))

    return make


@pytest.fixture(scope="session")
def readable_of(table_of: Callable[..., LanguageModel]) -> Callable[..., LanguageModel]:
    """A `ReadableTable` over a table that is given."""

    def make(*arguments: Any, **more: Any) -> LanguageModel:
        return ReadableTable(table_of(*arguments, **more))

    return make
