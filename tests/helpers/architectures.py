"""Small random models of the architectures that transformers can build, and the page of docs about them.

The table of them is in `architecture_table.py` and `architecture_chains.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CONTEXT = 64
WINDOW = 16
UNCHANGING = 28
"""Tokens of a text, prompt included, of a model that reads all tokens alike."""
BEHIND_WINDOWS = 40
"""Tokens of a text that has passed its windows twice."""
PROMPT = 8
LATE_PROMPT = 32
"""Tokens of a prompt whose text runs to the context's end."""

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,  # the logits are wide apart and the text depends on all that is seen
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "tie_word_embeddings": False,  # tied ones of random weights repeat the last token
    "is_decoder": True,
    # The same by other names
    "d_model": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "attention_hidden_size": 32,
    "ffn_dim": 48,
    "block_ff_dim": 48,
    "shared_intermediate_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "max_target_positions": CONTEXT,
    "init_std": 0.25,
    "initializer_std": 0.25,
    # Windows
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    # Experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    # Latent attention and its index, which has many heads so that no two keys tie at 0
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": WINDOW,
    "index_head_dim": 16,
    "index_n_heads": 16,
    # Inputs for every layer
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    # Recurrent layers
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_mamba_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "conv_L_cache": 3,
    "lru_width": 32,
}
"""Sizes by the names of configurations; each takes those that it declares."""


SEEDS = {
    "apertus": 2,
    "aria_text": 4,
    "axk2": 3,
    "bart": 2,
    "bert": 9,
    "bert-generation": 2,
    "big_bird": 6,
    "biogpt": 1,
    "blenderbot": 3,
    "bloom": 8,
    "codegen": 8,
    "cohere": 1,
    "cohere2": 2,
    "cohere2-tied": 3,
    "cohere2_moe": 1,
    "cohere_compass_text": 5,
    "ctrl": 1,
    "data2vec-text": 4,
    "deepseek_v2-lite": 5,
    "deepseek_v4": 5,
    "electra": 9,
    "ernie": 9,
    "exaone4-full": 4,
    "falcon": 7,
    "falcon-alibi": 1,
    "falcon-alibi-new": 5,
    "falcon-new": 1,
    "falcon-sequential": 7,
    "flex_olmo": 5,
    "gemma3_text": 8,
    "gemma3_text-linear": 2,
    "glm": 1,
    "gpt_bigcode-multi-head": 3,
    "gpt_neox": 1,
    "gpt_neox-sequential": 3,
    "gpt_neox_japanese": 1,
    "gpt_oss-yarn": 3,
    "granite_swa": 1,
    "granitemoehybrid": 6,
    "hrm_text": 4,
    "hunyuan_v1_moe": 2,
    "hy_v3": 5,
    "lfm2": 4,
    "llama-longrope-long-prompt": 7,
    "llama-yarn": 8,
    "llama4_text-long-prompt": 4,
    "longcat_flash": 6,
    "marian": 8,
    "megatron-bert": 1,
    "mellum": 1,
    "minicpm3": 2,
    "minimax_m2": 1,
    "mpt": 8,
    "mvp": 2,
    "nanochat": 1,
    "nemotron": 2,
    "nemotron_h": 5,
    "pegasus": 1,
    "persimmon": 2,
    "phi": 5,
    "phi-normed": 1,
    "phi3": 8,
    "phi3-longrope": 3,
    "phi3-longrope-window": 2,
    "phi3-window": 7,
    "phimoe-longrope-long-prompt": 5,
    "phimoe-window": 6,
    "qwen3_moe": 1,
    "rembert": 1,
    "roberta": 4,
    "roc_bert": 3,
    "roformer": 34,
    "smollm3-windows": 8,
    "stablelm-parallel": 2,
    "starcoder2": 1,
    "starcoder2-window": 2,
    "trocr": 2,
    "xlm-roberta-xl": 2,
    "xmod": 3,
    "youtu": 1,
    "zaya": 3,
}
"""Seeds of weights whose text would be monotonous, or nearly tied somewhere, with 0."""


class Case(NamedTuple):
    """A configuration of an architecture.

    Attributes:
        kind: the configuration's `model_type`.
        variant: what is special, in a word or two; unique among the cases of a kind.
        settings: of the configuration, beside `SMALL` or in place of it; `...` leaves one of `SMALL` to its default.
        prompt: tokens of the prompt; by default as many as for others of the family.
        attention: implementation; the architecture's usual one by default.
        model: name of the model's class; by default its causal LM.
    """

    kind: str
    variant: str = ""
    settings: dict[str, Any] = {}  # noqa: RUF012  (of a tuple: never written)
    prompt: int | None = None
    attention: str | None = None
    model: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}-{self.variant}".strip("-").replace(" ", "-")


class Family(NamedTuple):
    """Architectures of a kind, for which the same holds.

    Attributes:
        name: in the docs.
        chains: whether chains of candidates are verified, exactly.
        trees: whether trees of candidates are, too.
        note: in the docs: what was tried, or the reason of the refusal and the way out.
        cases: configurations.
        end: tokens of a text, prompt included, unless a case has a prompt of its own: then, as by default, it runs to
            the context's end. Less where nothing changes behind: with learned positions and switches something does.
        prompt: tokens of a prompt.
        reason: regular expression found in the message that refuses the family, or its trees.
    """

    name: str
    chains: bool
    trees: bool
    note: str
    cases: tuple[Case, ...]
    reason: str = ""
    end: int = CONTEXT
    prompt: int = PROMPT


def declared_fields(kind: type[PretrainedConfig]) -> set[str]:
    """Names of the settings that a class of configurations declares."""
    return {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}


def build(case: Case, seed: int | None = None) -> PreTrainedModel:
    """Make the random model of a case, with the seed of `SEEDS` or another."""
    config = small_config(case.kind, case.settings)
    model_type: Any = getattr(transformers, case.model or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[case.kind])
    torch.manual_seed(SEEDS.get(str(case), 0) if seed is None else seed)
    chosen = {} if case.attention is None else {"attn_implementation": case.attention}
    model: PreTrainedModel = model_type._from_config(config, **chosen)
    return model.eval()


def small_config(kind: str, extra: dict[str, Any]) -> PretrainedConfig:
    """Make a small configuration of a kind, with some settings beside `SMALL` or in place of it."""
    config_type: Any = CONFIG_MAPPING[kind]
    fields, other_names = declared_fields(config_type), getattr(config_type, "attribute_map", {})
    settings: dict[str, Any] = {}
    for name, value in SMALL.items():
        declared = name if name in fields else other_names.get(name, name)
        if declared in fields:
            settings.setdefault(declared, value)
    settings |= extra
    return config_type(**{name: value for name, value in settings.items() if value is not ...})


def text_settings(kind: str, **settings: Any) -> dict[str, Any]:
    """Settings of the text part of a model that also sees or hears."""
    return {**small_config(kind, settings).to_dict(), "model_type": kind}


def repeats(kinds: str, variant: str = "", **settings: Any) -> tuple[Case, ...]:
    """Cases of several kinds, named with blanks between, with the same settings."""
    return tuple(Case(kind, variant, settings) for kind in kinds.split())
