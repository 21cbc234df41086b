"""What heads are worth in decoding, on prompts kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..decoders.medusa import MedusaDecoder, MedusaHeads
from ..loading.pair import Pair
from .distilled_text import DistilledText
from .prompt_windows import SPEED
from .speed import Speed, compare


def speed_prompts(text: DistilledText, count: int) -> dict[str, list[list[int]]]:
    """Prompts to measure the speed on, by domain, as many of each as ``count`` allows and at least one."""
    found = {}
    for place, domain in enumerate(text.domains):
        rows = np.flatnonzero((text.side == SPEED) & (text.domain == place))[: max(1, count // len(text.domains))]
        found[domain] = [text.tokens[row, : text.prompts[row]].tolist() for row in rows]
    return found


def measure_speed(
    pair: Pair, heads: MedusaHeads, prompts: Mapping[str, Sequence[Sequence[int]]], size: int, new_tokens: int
) -> dict[str, Speed]:
    """Generate greedily from the same prompts with and without heads.

    Args:
        pair: the target.
        heads: attached to it.
        prompts: by domain, token ids.
        size: candidates verified a round, at least 1.
        new_tokens: at most, after each prompt.
    """
    decoder = MedusaDecoder(pair, heads, max_tree=size)
    knobs = {"heads": heads.shape.heads, "tree_size": size}
    found = dict.fromkeys(prompts, Speed())
    for domain, made, plain in compare(decoder, knobs, prompts, new_tokens):
        found[domain] += Speed.of(made, plain)
    return found
