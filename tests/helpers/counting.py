"""Small things to fit: text, and a target that counts in a circle, which heads can learn within seconds."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

CIRCLE = range(20, 32)


def words(count: int, seed: int = 0) -> str:
    """Text with some regularity: lines of a few words."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(["the", "spec", "draft", "token", "model", "of", "and"], count)
    return "\n\n".join(" ".join(chosen[i : i + 9]) for i in range(0, count, 9))


def counting_model(vocabulary: int) -> PreTrainedModel:
    """A target that counts through the circle of tokens, and enters it from any other; its layers do nothing."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(vocabulary, 64), dim=-1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for place, token in enumerate(CIRCLE):
            model.lm_head.weight[token] = 2 * embeddings[CIRCLE[place - 1]]
    return model.eval()
