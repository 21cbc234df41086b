"""Architectures of which trees of candidates are verified: configurations by family."""

from __future__ import annotations

from typing import Any

from tests.helpers.architectures import (
    BEHIND_WINDOWS,
    LATE_PROMPT,
    UNCHANGING,
    WINDOW,
    Case,
    Family,
    repeats,
    text_settings,
)

MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
FULL: dict[str, Any] = {"layer_types": ["full_attention", "full_attention"]}
CHUNKS: dict[str, Any] = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
NO_WINDOW: dict[str, Any] = {"sliding_window": None}
LATENT: dict[str, Any] = {"num_key_value_heads": 4}
FACTORS: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 4.0, 20.0]}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """Settings of a rotation."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LONGROPE = rope("longrope", original_max_position_embeddings=32, **FACTORS)
PHI_LONGROPE = {**LONGROPE, "original_max_position_embeddings": 32}
PHIMOE_LONGROPE = {
    **rope("longrope", original_max_position_embeddings=32, short_mscale=1.0, long_mscale=1.2, **FACTORS),
    "original_max_position_embeddings": 32,
    **NO_WINDOW,
}
GEMMA_3N: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
    **MIXED,
}
SHARED: dict[str, Any] = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED["layer_types"] * 2}
ROBERTA: dict[str, Any] = {"pad_token_id": 1}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
EYES = {
    "vision_config": {"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16, **VISION},
    "image_token_index": 95,
}
GEMMA_EYES = {
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 8, **VISION},
    "mm_tokens_per_image": 4,
    "boi_token_index": 93,
    "eoi_token_index": 94,
    "image_token_index": 95,
}
QWEN_EYES = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "intermediate_size": 16,
    },
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "video_token_id": 94,
    "image_token_id": 95,
}

WITH_TREES: tuple[Family, ...] = (
    Family(
        "Llama and its like: full attention, rotated positions",
        chains=True,
        trees=True,
        note="eager and SDPA attention; tied, multi-query and multi-head; linear, dynamic, YaRN and Llama 3 scaling",
        end=UNCHANGING,
        cases=(
            Case("llama"),
            Case("llama", "eager", attention="eager"),
            Case("llama", "tied", {"tie_word_embeddings": True}),
            Case("llama", "multi-query", {"num_key_value_heads": 1}),
            Case("llama", "multi-head", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
            Case("llama", "wide heads", {"head_dim": 16}),
            Case("llama", "linear", rope("linear", factor=4.0)),
            Case("llama", "dynamic", rope("dynamic", factor=2.0)),
            Case("llama", "yarn", rope("yarn", factor=4.0, original_max_position_embeddings=24)),
            Case(
                "llama",
                "llama3",
                rope(
                    "llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=24,
                ),
            ),
            *repeats(
                "apertus arcee bitnet cohere diffllama ernie4_5 gemma glm glm4 granite helium hunyuan_v1_dense "
                "hyperclovax jais2 nanochat nemotron olmo olmo2 persimmon qwen2 qwen3 seed_oss"
            ),
            Case("qwen2", "eager", attention="eager"),
            *repeats("doge mistral ministral3 phi3 starcoder2", **NO_WINDOW),
            *repeats("exaone4 flint olmo3", "full", **FULL),
            Case("smollm3", "", {"no_rope_layers": [1, 0], **NO_WINDOW}),
            Case("hrm_text"),
        ),
    ),
    Family(
        "GPT-NeoX, GPT-J, Phi, Falcon and others: partly rotated, or parallel blocks",
        chains=True,
        trees=True,
        note="sequential and parallel residuals, multi-query, normed queries and keys",
        end=UNCHANGING,
        cases=(
            Case("codegen", "", {"rotary_dim": 4}),
            Case("falcon"),
            Case("falcon", "new", {"new_decoder_architecture": True, "num_kv_heads": 2}),
            Case("falcon", "sequential", {"parallel_attn": False, "multi_query": False}),
            Case("gpt_neox"),
            Case("gpt_neox", "sequential", {"use_parallel_residual": False}),
            Case("gpt_neox_japanese"),
            Case("gptj", "", {"rotary_dim": 4}),
            Case("phi"),
            Case("phi", "normed", {"qk_layernorm": True}),
            Case("stablelm"),
            Case("stablelm", "parallel", {"use_parallel_residual": True, "qk_layernorm": True}),
        ),
    ),
    Family(
        "GPT-2, OPT and others: learned or sinusoidal positions",
        chains=True,
        trees=True,
        note="OPT-350m's norms and projections, GPT-2's scaled attention, multi-query of GPT-BigCode",
        prompt=LATE_PROMPT,
        cases=(
            *repeats("biogpt ctrl gpt2 gpt_bigcode opt xglm"),
            Case("gpt2", "eager", attention="eager"),
            Case("gpt2", "scaled", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
            Case("gpt_bigcode", "multi-head", {"multi_query": False}),
            Case("opt", "350m", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        ),
    ),
    Family(
        "Experts",
        chains=True,
        trees=True,
        note="routed and shared experts, dense first layers",
        end=UNCHANGING,
        cases=(
            *repeats(
                "aria_text ernie4_5_moe flex_olmo glm4_moe granitemoe granitemoeshared hunyuan_v1_moe hy_v3 jetmoe "
                "minimax_m2 minimax_m3_vl_text olmoe qwen2_moe qwen3_moe solar_open"
            ),
            *repeats("mixtral phimoe", **NO_WINDOW),
            *repeats("dots1 exaone_moe laguna mellum", "full", **FULL),
        ),
    ),
    Family(
        "Latent attention (MLA)",
        chains=True,
        trees=True,
        note="with experts and without; queries compressed or not",
        end=UNCHANGING,
        cases=(
            *repeats("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu", **LATENT),
            Case("deepseek_v2", "lite", {"q_lora_rank": None, **LATENT}),
            Case("longcat_flash", "", {"num_layers": 2, **LATENT}),
        ),
    ),
    Family(
        "Sliding windows in all layers",
        chains=True,
        trees=True,
        note="text runs through many windows, prompts are shorter and longer than one",
        end=BEHIND_WINDOWS,
        cases=(
            Case("mistral", "window"),
            Case("mistral", "window eager", attention="eager"),
            Case("mistral", "window long prompt", prompt=40),
            Case("mistral", "wide window", {"sliding_window": 64}),
            Case("mixtral", "window"),
            Case("ministral", "window"),
            Case("ministral3", "window"),
            Case("phi3", "window"),
            Case("phimoe", "window"),
            Case("starcoder2", "window"),
            Case("doge", "window"),
            Case("qwen2", "windows", {"use_sliding_window": True, "max_window_layers": 0}),
            Case("qwen3_moe", "window", {"use_sliding_window": True}),
        ),
    ),
    Family(
        "Sliding windows in some layers",
        chains=True,
        trees=True,
        note="with attention sinks (GPT-OSS), soft caps (Gemma 2), rotation in some layers only, keys shared by layers "
        "(Gemma 3n and 4), windows that the configuration names and no layer uses",
        end=BEHIND_WINDOWS,
        cases=(
            Case("gemma2", "", {**MIXED}),
            Case("gemma2", "eager", {**MIXED}, attention="eager"),
            Case("gemma3_text", "", {**MIXED}),
            Case("gemma3_text", "long prompt", {**MIXED}, prompt=40),
            Case(
                "gemma3_text",
                "linear",
                {
                    **MIXED,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    },
                },
            ),
            Case("gemma3n_text", "", {**GEMMA_3N}),
            Case("gemma3n_text", "shared", {**SHARED, "activation_sparsity_pattern": [0.0] * 4}),
            Case("gemma4_text", "", {**MIXED}),
            Case("gemma4_text", "shared", {**SHARED}),
            Case("gemma4_unified_text", "", {**MIXED}),
            Case("vaultgemma", "", {**MIXED}),
            Case("gpt_oss", "", MIXED),
            Case(
                "gpt_oss",
                "yarn",
                {**MIXED, **rope("yarn", factor=4.0, truncate=False, original_max_position_embeddings=24)},
            ),
            *repeats(
                "afmoe beam cohere2 cohere2_moe exaone4 exaone_moe flint granite_swa granitemoe_swa kolibri1 laguna "
                "mellum mimo_v2_flash ministral olmo3 dots1",
                **MIXED,
            ),
            Case("cohere2", "tied", {**MIXED, "tie_word_embeddings": True}),
            Case("smollm3", "windows", {"use_sliding_window": True, "no_rope_layers": [1, 0], **MIXED}),
            Case("qwen2", "some windows", {"use_sliding_window": True, "max_window_layers": 1}),
            Case("qwen3", "some windows", {"use_sliding_window": True, "max_window_layers": 1}),
            Case("qwen2_moe", "some windows", {"use_sliding_window": True, "max_window_layers": 1}),
            Case("cwm", "", {"bos_token_id": 1, "eos_token_id": ..., **MIXED}),
            Case(
                "cohere_compass_text",
                "",
                {
                    **MIXED,
                    "logit_scale": 0.5,
                    "rope_parameters": {
                        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in MIXED["layer_types"]
                    },
                },
            ),
            Case(
                "modernbert-decoder",
                "",
                {
                    **MIXED,
                    **{f"{name}_token_id": place for place, name in enumerate(("pad", "bos", "cls", "sep"))},
                    "eos_token_id": ...,
                    "local_attention": 2 * WINDOW,
                },
            ),
        ),
    ),
    Family(
        "Chunked attention (Llama 4)",
        chains=True,
        trees=True,
        note="without the temperature of `attn_temperature_tuning`",
        end=BEHIND_WINDOWS,
        cases=(
            Case("llama4_text", "", {**CHUNKS, "attn_temperature_tuning": False}),
            Case("llama4_text", "long prompt", {**CHUNKS, "attn_temperature_tuning": False}, prompt=40),
        ),
    ),
    Family(
        "Rotation that switches (longrope)",
        chains=True,
        trees=True,
        note="Phi-3 and PhiMoE drop their cache at the switch, others do not; prompts before, at and behind it",
        cases=(
            Case("llama", "longrope", LONGROPE),
            Case("llama", "longrope long prompt", LONGROPE, prompt=40),
            Case("minicpm3", "longrope", {**LATENT, **LONGROPE}),
            Case("minicpm3", "longrope long prompt", {**LATENT, **LONGROPE}, prompt=40),
            Case("phi3", "longrope", {**PHI_LONGROPE, **NO_WINDOW}),
            Case("phi3", "longrope edge", {**PHI_LONGROPE, **NO_WINDOW}, prompt=32),
            Case("phi3", "longrope long prompt", {**PHI_LONGROPE, **NO_WINDOW}, prompt=40),
            Case("phi3", "longrope window", PHI_LONGROPE),
            Case("phimoe", "longrope", PHIMOE_LONGROPE),
            Case("phimoe", "longrope long prompt", PHIMOE_LONGROPE, prompt=40),
        ),
    ),
    Family(
        "Decoders of BERT's kind",
        chains=True,
        trees=True,
        note="`is_decoder=True`; positions as `generate()` gives them",
        prompt=LATE_PROMPT,
        cases=(
            *repeats("bert bert-generation big_bird electra ernie megatron-bert rembert"),
            *repeats("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl", **ROBERTA),
            Case("xmod", "", {**ROBERTA, "default_language": "en_XX"}),
            Case(
                "roc_bert",
                "",
                {
                    "pronunciation_embed_dim": 8,
                    "shape_embed_dim": 8,
                    "shape_vocab_size": 96,
                    "pronunciation_vocab_size": 96,
                },
            ),
        ),
    ),
    Family(
        "Models that also see: their texts",
        chains=True,
        trees=True,
        note="prompts without pictures",
        end=UNCHANGING,
        cases=(
            Case("llava", "", {"text_config": text_settings("llama"), **EYES}, model="LlavaForConditionalGeneration"),
            Case(
                "gemma3",
                "",
                {"text_config": text_settings("gemma3_text", **MIXED), "tie_word_embeddings": False, **GEMMA_EYES},
            ),
            Case(
                "qwen2_5_vl",
                "",
                {
                    "text_config": text_settings("qwen2_5_vl_text", **rope("default", mrope_section=[1, 1, 2])),
                    **QWEN_EYES,
                },
                model="Qwen2_5_VLForConditionalGeneration",
            ),
        ),
    ),
)
