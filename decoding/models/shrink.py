"""Small configurations with the structure of large ones: the same kinds of layers, few and narrow, short windows.

Models of them, with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

WINDOW = 8
SWITCH = 12
CONTEXT = 32
START = 3
"""Token with which texts of a decoder beside an encoder begin."""
_HEADS = 2
_HEAD = 16
_MOST_LAYERS = 12

_SIZES = {
    # what all have
    "vocab_size": 64,
    "hidden_size": _HEADS * _HEAD,
    "num_attention_heads": _HEADS,
    "head_dim": _HEAD,
    "v_head_dim": _HEAD,
    "swa_head_dim": _HEAD,
    "swa_v_head_dim": _HEAD,
    "global_head_dim": _HEAD,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "word_embed_proj_dim": _HEADS * _HEAD,
    "embedding_size": _HEADS * _HEAD,
    "rotary_dim": 8,
    # beside an encoder
    "decoder_vocab_size": 64,
    "cross_attention_hidden_size": _HEADS * _HEAD,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": _HEADS,
    "num_encoder_attention_heads": _HEADS,
    "num_decoder_attention_heads": _HEADS,
    "relative_attention_max_distance": 16,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": START,
    # how far
    "max_position_embeddings": CONTEXT,
    "n_positions": CONTEXT,
    "max_seq_len": CONTEXT,
    "max_target_positions": CONTEXT,
    "floor_scale": WINDOW,
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "original_max_position_embeddings": SWITCH,
    "max_window_layers": 0,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention and inputs for every layer
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 4,
    # recurrent layers
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": _HEAD,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": _HEAD,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # tokens that a small vocabulary lacks
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
)


def shrunken(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A small copy of a configuration; None if its layers cannot be shortened to a few that have all kinds.

    Args:
        config: of a language model, without what it has for other inputs.
    """
    small = copy.deepcopy(config)
    values = vars(small)
    layers = next((int(values[name]) for name in _layer_names(small) if values.get(name)), 0)
    lists = {name: value for name, value in values.items() if isinstance(value, list) and value}
    places = {name: value for name, value in lists.items() if _are_places(value, layers)}
    rows = {name: value for name, value in lists.items() if len(value) == layers > 1 and name not in places}
    shared = int(values.get("num_kv_shared_layers") or 0)  # the last layers, which use keys and values of earlier ones
    if layers == 1 and not any("layer" in name for name in lists):
        layers = 2  # a draft's only layer is then tried together with its target's
    few = _prefix({name: row[: layers - shared] for name, row in rows.items()}, layers - shared)
    if few is None:
        return None
    if shared:
        rows = {name: row[:few] + row[-few:] for name, row in rows.items()}
        values["num_kv_shared_layers"], few = few, 2 * few
    kv = getattr(config, "num_key_value_heads", None)
    grouped = isinstance(kv, int) and kv < int(getattr(config, "num_attention_heads", kv))
    sizes = {**_SIZES, "num_key_value_heads": 1 if grouped else _HEADS, "num_global_key_value_heads": 1}
    for name, size in sizes.items():
        if values.get(small.attribute_map.get(name, name)) is not None:
            setattr(small, name, size)
    if vars(config).get("head_dim") == vars(config).get("qk_rope_head_dim", 0):  # latent attention rotates so many
        small.head_dim = sizes["qk_rope_head_dim"]
    for name in _layer_names(small):
        if values.get(name):
            values[name] = few
    for name, row in rows.items():
        values[name] = row[:few]
    for name, row in places.items():
        values[name] = [place for place in row if place < few]
    if values.get("attention_types"):  # GPT-Neo repeats kinds of layers so often
        values["attention_types"] = [[list(values["attention_layers"]), 1]]
    for name in ("encoder", "decoder"):  # T5Gemma has a configuration for each
        if isinstance(values.get(name), PreTrainedConfig):
            values[name] = shrunken(values[name])
            if values[name] is None:
                return None
    _shorten_rotation(getattr(small, "rope_parameters", None), values.get("qk_rope_head_dim") or _HEAD)
    return small


def _layer_names(config: PreTrainedConfig) -> list[str]:
    return list(dict.fromkeys([config.attribute_map.get(name, name) for name in _LAYERS]))


def _are_places(row: list[Any], layers: int) -> bool:
    """True for a list of layers by their numbers, such as those with experts."""
    ascending = all(type(place) is int for place in row) and sorted(set(row)) == row
    return ascending and len(row) > 1 and row[-1] < layers


def _prefix(rows: dict[str, list[Any]], layers: int) -> int | None:
    """Fewest first layers, at least 2, that have every kind of layer; None if those are too many."""
    kinds = [repr(kind) for kind in zip(*rows.values(), strict=True)] if rows else []
    few = next((few for few in range(1, layers + 1) if set(kinds[:few]) == set(kinds)), layers) if kinds else 1
    few = max(few, min(2, layers))
    return few if few <= _MOST_LAYERS else None


def _shorten_rotation(parameters: Any, width: int) -> None:
    for part in [parameters, *parameters.values()] if isinstance(parameters, dict) else []:
        if not isinstance(part, dict):
            continue
        if part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = SWITCH
        rotated = int(width * (part.get("partial_rotary_factor") or 1)) // 2
        for name in ("short_factor", "long_factor"):
            factors = part.get(name)
            if factors:
                part[name] = [factors[place * (len(factors) - 1) // max(rotated - 1, 1)] for place in range(rotated)]


def random_model(build: Callable[[PreTrainedConfig], Any], config: PreTrainedConfig) -> Any:
    """Return a model of a small configuration with random weights, the same ones each time; on the CPU, in float32."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = build(config).float().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.2)
                elif "dt_bias" in name:  # so that time steps go to where they may be limited
                    weight.normal_(0, 4)
    return model
