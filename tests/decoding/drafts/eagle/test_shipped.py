"""The heads that ship: small, right about their targets, and often right about their texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from specgym.decoding import (
    DraftTreeDecoder,
    EagleDrafter,
    SpeculativeDecoder,
    load_pair,
    load_prompts,
)
from specgym.decoding.drafts.eagle.files import _SHIPPED, WEIGHTS, shipped_heads
from specgym.decoding.loading import smollm2
from specgym.decoding.loading.presets import PRESETS
from specgym.decoding.loading.prompt_tokens import encode

NEW = 20
TOGETHER = 8e6
"""Bytes of all of them, at most."""


def test_together_they_are_small_and_each_is_in_a_preset() -> None:
    assert shipped_heads() == ("smollm2-eagle", "tiny-10m-eagle", "tiny-3m-eagle")
    sizes = [path.stat().st_size for name in shipped_heads() for path in (_SHIPPED / name).iterdir()]
    assert sum(sizes) < TOGETHER
    assert set(shipped_heads()) <= {preset.draft for preset in PRESETS.values()}
    for name in shipped_heads():
        stored = load_file(_SHIPPED / name / WEIGHTS)
        assert {tensor.dtype for key, tensor in stored.items() if tensor.ndim == 2 and key != "probe"} == {torch.int8}
        card = (_SHIPPED / name / "README.md").read_text()
        assert "still going on" not in card
        assert f"--out decoding/data/models/{name}" in card


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("tiny-3m-eagle", 0.4),
        ("tiny-10m-eagle", 0.4),
        pytest.param(
            "smollm2-eagle",
            0.15,
            marks=pytest.mark.skipif(
                not smollm2.model_folder().is_dir(), reason="SmolLM2 was never fetched on this machine"
            ),
        ),
    ],
)
def test_texts_equal_generate_and_much_is_accepted(
    reference: Callable[..., list[list[int]]], name: str, accepted: float
) -> None:
    pair = load_pair(name, offline=True)
    assert isinstance(pair.draft, EagleDrafter)
    assert pair.tokenizer is not None
    shares = list[float]()
    for prompt_set in ("code", "prose"):
        prompts = encode(load_prompts(prompt_set, limit=1), "test", pair.tokenizer, 128)
        for prompt, expected in zip(prompts, reference(pair.target.model, prompts, NEW), strict=True):
            result = SpeculativeDecoder(pair).generate(prompt, max_new_tokens=NEW, knobs={"draft_length": 3})
            assert result.tokens == expected
            drafted = sum(round_.drafted for round_ in result.rounds)
            shares.append(sum(round_.accepted for round_ in result.rounds) / drafted)
    tree = DraftTreeDecoder(pair).generate(prompt, max_new_tokens=NEW)
    assert tree.tokens == expected
    assert sum(shares) / len(shares) > accepted
