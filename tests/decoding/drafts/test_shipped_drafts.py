"""The drafts that ship for SmolLM2, which find their embeddings and their tokeniser elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.loading import find_model as loading
from specgym.decoding.loading import presets, smollm2
from specgym.decoding.loading.checkpoint import load_checkpoint, read_link
from specgym.decoding.loading.pair import load_pair
from specgym.decoding.loading.prompt_tokens import encode
from specgym.decoding.models.output_layer import reduced_output
from specgym.decoding.prompts import load_prompts

NEW = 24


@pytest.fixture(scope="module")
def lookalike() -> PreTrainedModel:
    """A model with SmolLM2's embeddings in shape, and no layers."""
    config = AutoConfig.from_pretrained(loading._SHIPPED / "smollm2-draft-2l")
    config.num_hidden_layers = 0
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "layers", "megabytes"), [("2l", 2, 7.5), ("4l", 4, 11.0)])
def test_the_folder_holds_the_layers_in_8_bits_and_the_tokens_that_they_propose(
    lookalike: PreTrainedModel, name: str, layers: int, megabytes: float
) -> None:
    folder = loading._SHIPPED / f"smollm2-draft-{name}"
    link = read_link(folder)
    assert link.shared_with == link.tokenizer == presets.SMOLLM2
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim == 2} == {torch.int8}
    assert not [name for name, tensor in stored.items() if len(tensor) == 49_152]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6 * megabytes
    draft = load_checkpoint(folder, shared_from=lookalike)
    assert draft.config.num_hidden_layers == layers
    assert draft.get_input_embeddings().weight is lookalike.get_input_embeddings().weight
    layer = reduced_output(draft)
    assert layer is not None
    assert len(layer.tokens) == 8_000
    with torch.inference_mode():
        scores = draft(torch.tensor([[1, 2, 3]])).logits
    assert scores.shape == (1, 3, 49_152)
    assert scores.isfinite().all()


@pytest.mark.skipif(not smollm2.model_folder().is_dir(), reason="SmolLM2 was never fetched on this machine")
@pytest.mark.parametrize("name", ["smollm2-2l", "smollm2-4l"])
def test_greedy_texts_equal_generate(reference: Callable[..., list[list[int]]], name: str) -> None:
    pair = load_pair(name, offline=True)
    assert pair.tokenizer is not None
    decoder = SpeculativeDecoder(pair)
    drafted = accepted = 0
    for prompt_set in ("chat", "code", "definitions", "prose"):
        prompts = encode(load_prompts(prompt_set, limit=1), "test", pair.tokenizer, 256)
        for prompt, expected in zip(prompts, reference(pair.target.model, prompts, NEW), strict=True):
            result = decoder.generate(prompt, max_new_tokens=NEW, knobs={"draft_length": 3})
            assert result.tokens == expected
            drafted += sum(round_.drafted for round_ in result.rounds)
            accepted += sum(round_.accepted for round_ in result.rounds)
    assert accepted / drafted > 0.2
