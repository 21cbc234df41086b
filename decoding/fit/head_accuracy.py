"""How often the token that a head ranks first, second, ... is the one that follows, on text it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..decoders.medusa import MedusaHeads
from ..decoders.medusa.trees import LARGEST_TREE
from .hidden_states import HiddenStates
from .labels import IGNORED

_POSITIONS_AT_A_TIME = 512


@dataclass(frozen=True)
class Accuracy:
    """Shares of positions, in [0, 1].

    Attributes:
        shares: of positions at which the token of each head and rank was right, shape (heads, ranks).
        counts: of positions that each head was judged on, shape (heads,), int64.
    """

    shares: np.ndarray
    counts: np.ndarray

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """The shares as `MedusaHeads.accuracies` has them."""
        return tuple(tuple(row) for row in self.shares.tolist())

    def top(self, ranks: int) -> np.ndarray:
        """Shares of positions at which one of each head's first ranks was right, shape (heads,)."""
        return self.shares[:, :ranks].sum(1)


def accuracies(
    heads: MedusaHeads, states: HiddenStates, positions: np.ndarray
) -> tuple[Accuracy, Mapping[str, Accuracy]]:
    """Judge heads in all and by domain. Where a reduced vocabulary lacks the right token, a head is wrong.

    Args:
        heads: attached to the target.
        states: of the target.
        positions: numbers of those to judge on, shape (m,), int64.
    """
    count, ranks = heads.shape.heads, min(LARGEST_TREE, heads.shape.outputs)  # so that even one head alone can fill it
    domains = states.text.domains
    hits = np.zeros((len(domains), count, ranks), dtype=np.int64)
    seen = np.zeros((len(domains), count), dtype=np.int64)
    device = heads.weight.device
    domain_of = states.text.domain[states.row[positions]]
    starts = range(0, len(positions), _POSITIONS_AT_A_TIME)
    for start in tqdm(starts, unit="batch", mininterval=5.0, desc="accuracies"):
        part = positions[start : start + _POSITIONS_AT_A_TIME]
        labels = states.labels(part, count).to(device)
        with torch.inference_mode():
            found = heads(states.hidden(part).to(device)).topk(ranks, dim=-1).indices
        counted = labels != IGNORED
        # A label that the heads cannot propose becomes IGNORED too, which no place is; it counts as wrong.
        places = torch.where(counted, heads.places_of(labels.clamp(min=0)), IGNORED)
        right = (found == places.unsqueeze(-1)).cpu().numpy()
        of_domain = domain_of[start : start + _POSITIONS_AT_A_TIME]
        for place in np.unique(of_domain):
            members = of_domain == place
            hits[place] += right[:, members].sum(1)
            seen[place] += counted.cpu().numpy()[:, members].sum(1)
    by_domain = {domain: _accuracy(hits[place], seen[place]) for place, domain in enumerate(domains)}
    return _accuracy(hits.sum(0), seen.sum(0)), by_domain


def _accuracy(hits: np.ndarray, seen: np.ndarray) -> Accuracy:
    return Accuracy(hits / np.maximum(seen, 1)[:, None], seen)
