"""The heads that ship: greedy texts stay the target's own, and come at two tokens a pass and more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from specgym.decoding.decoders.medusa.decoder import MedusaDecoder, TypicalMedusaDecoder
from specgym.decoding.decoders.medusa.trees import cartesian
from specgym.decoding.loading.pair import load_pair
from specgym.decoding.prompts import load_prompts

Reference = Callable[..., list[list[int]]]
NEW = 32


@pytest.mark.parametrize("name", ["tiny-3m", "tiny-10m"])
def test_greedy_texts_equal_generate_at_two_tokens_a_pass_or_more(name: str, reference: Reference) -> None:
    pair = load_pair(name)
    tokens = rounds = 0
    for domain in ("prose", "code", "definitions"):
        prompts = [pair.encode(text)[:64] for text in load_prompts(domain).test[:4]]
        expected = reference(pair.target.model, prompts, NEW)
        decoder = MedusaDecoder(pair)
        others = [
            (MedusaDecoder(pair, tree=cartesian([2, 2, 1])), None),
            (decoder, {"heads": 1, "tree_size": 3}),
            (TypicalMedusaDecoder(pair), {"heads": 5, "tree_size": 64}),
        ]
        for number, prompt in enumerate(prompts):
            result = decoder.generate(prompt, max_new_tokens=NEW, knobs={"tree_size": 32})
            assert result.tokens == expected[number]
            tokens, rounds = tokens + len(result.tokens), rounds + len(result.rounds)
            other, knobs = others[number % 3]
            assert other.generate(prompt, max_new_tokens=NEW, knobs=knobs).tokens == expected[number]
    assert tokens / rounds >= 2.0
