"""Medusa heads without training to speak of: sometimes right, often right, or always saying the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa.heads import MedusaHeads
from specgym.decoding.models.language_model import LanguageModel


def random_heads(
    model: PreTrainedModel, heads: int = 4, *, spread: float = 0.3, seed: int = 0, **more: Any
) -> MedusaHeads:
    """Untrained heads, which say what the target does, with noise; `more` as for `MedusaHeads.for_target`."""
    result = MedusaHeads.for_target(model, heads, **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return result.eval()


def taught_heads(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], heads: int = 4, *, steps: int = 60, **more: Any
) -> MedusaHeads:
    """Heads that are often right about some texts: a few steps of training; `more` as for `random_heads`."""
    result = random_heads(model, heads, **{"spread": 0.05, **more})
    states, expected = [], []
    for text in texts:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
        count = max(0, len(text) - heads - 1)
        states.append(hidden[:count])
        # The state of a token gives the next one to the target, and the one after that to the first head.
        expected.append(torch.tensor([[text[place + 2 + head] for place in range(count)] for head in range(heads)]))
    inputs, labels = torch.cat(states), result.places_of(torch.cat(expected, dim=1))
    optimiser = torch.optim.Adam(result.parameters(), lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(result(inputs).flatten(0, 1), labels.flatten()).backward()
        optimiser.step()
    return result.eval()


def scripted_heads(target: LanguageModel, rankings: Sequence[Sequence[int]]) -> MedusaHeads:
    """Heads of a `ReadableTable` that propose the same tokens everywhere: for each head, the likeliest first."""
    result = MedusaHeads.for_target(target.model, len(rankings))
    with torch.no_grad():
        for head, ranking in enumerate(rankings):
            for place, token in enumerate(ranking):  # far above any logit, and where SiLU changes nothing
                result.bias[0, head, token] = 1000.0 * (len(ranking) - place)
    return result.eval()
