"""Small models with random weights, of several architectures."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

FAMILIES = ("llama", "opt", "gpt2", "qwen2", "gpt_neox", "phi", "mistral")


def random_model(
    family: str,
    *,
    layers: int = 2,
    vocabulary: int = 96,
    hidden: int = 32,
    context: int = 256,
    attention: str = "sdpa",
    spread: float = 0.3,
    seed: int = 0,
    **more: Any,
) -> PreTrainedModel:
    """A small model with random weights, wide enough apart (`spread`) that its logits never tie; it knows no EOS.

    Args:
        family: one of `FAMILIES`.
        more: further settings of the architecture's configuration.
    """
    torch.manual_seed(seed)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    usual: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "initializer_range": spread,
        **ends,
    }
    grouped = {**usual, "num_key_value_heads": 2}
    config: Any
    kind: Any
    if family == "llama":
        config, kind = LlamaConfig(**{**grouped, **more}), LlamaForCausalLM
    elif family == "qwen2":
        config, kind = Qwen2Config(**{**grouped, **more}), Qwen2ForCausalLM
    elif family == "mistral":
        config, kind = MistralConfig(**{**grouped, "sliding_window": None, **more}), MistralForCausalLM
    elif family == "phi":
        config, kind = PhiConfig(**{**usual, **more}), PhiForCausalLM
    elif family == "gpt_neox":
        config, kind = GPTNeoXConfig(**{**usual, **more}), GPTNeoXForCausalLM
    elif family == "opt":
        opt = {**usual, "ffn_dim": usual.pop("intermediate_size"), "init_std": usual.pop("initializer_range")}
        opt.pop("intermediate_size"), opt.pop("initializer_range")
        config, kind = OPTConfig(**{**opt, "word_embed_proj_dim": hidden, **more}), OPTForCausalLM
    elif family == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_embd=hidden,
            n_layer=layers,
            n_head=4,
            n_positions=context,
            initializer_range=spread,
            **{**ends, **more},
        )
        kind = GPT2LMHeadModel
    else:
        raise ValueError(f"no family {family!r}")
    model: PreTrainedModel = kind._from_config(config, attn_implementation=attention)
    return model.eval()


def noisy_copy(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A draft that agrees with a model often but not always: the same weights with relative noise."""
    copied = type(model)._from_config(model.config, attn_implementation=model.config._attn_implementation)
    copied.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copied.parameters():
            weight += noise * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return copied.eval()
