"""Architectures that are decoded in chains alone, or not at all: configurations by family, with the reason."""

from __future__ import annotations

from typing import Any

from tests.helpers.architecture_table import CHUNKS, LATENT, WITH_TREES
from tests.helpers.architectures import BEHIND_WINDOWS, LATE_PROMPT, PROMPT, UNCHANGING, Case, Family, repeats

RECURRENT: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTIONS: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}

IN_CHAINS: tuple[Family, ...] = (
    Family(
        "Local attention (GPT-Neo)",
        chains=True,
        trees=False,
        note="its layers count their window in places of the cache, where the branches of a tree lie side by side",
        reason="small copy with short windows",
        end=BEHIND_WINDOWS,
        cases=(
            Case("gpt_neo", "", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
            Case("gpt_neo", "global", {"num_layers": 2, "attention_types": [[["global"], 2]]}),
        ),
    ),
    Family(
        "Llama 4 with a temperature",
        chains=True,
        trees=False,
        note="`attn_temperature_tuning`, as Llama 4 Scout has it: queries are scaled by their place in the cache",
        reason="small copy with short windows",
        end=BEHIND_WINDOWS,
        cases=(Case("llama4_text", "temperature", {**CHUNKS, "attn_temperature_tuning": True, "floor_scale": 16}),),
    ),
    Family(
        "ALiBi (BLOOM, MPT, Falcon with `alibi`)",
        chains=True,
        trees=False,
        note="the bias goes by places in the cache, and no other can be handed over",
        reason="its bias of positions|its forward takes no position_ids",
        end=UNCHANGING,
        cases=(
            Case("bloom", ""),
            Case("falcon", "alibi", {"alibi": True}),
            Case(
                "falcon",
                "alibi new",
                {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
            ),
            Case("mpt", "", {"expansion_ratio": 2}),
        ),
    ),
    Family(
        "Decoders that count positions themselves",
        chains=True,
        trees=False,
        note="no `position_ids`",
        prompt=LATE_PROMPT,
        reason="its forward takes no position_ids",
        cases=(
            *repeats(
                "bart bigbird_pegasus blenderbot blenderbot-small mbart mvp pegasus plbart roformer trocr whisper"
            ),
            Case("marian", prompt=PROMPT),
        ),
    ),
    Family(
        "Attention by an index (DeepSeek V3.2, GLM with DSA, DeepSeek V4, Qwen 4)",
        chains=True,
        trees=False,
        note="what the index or the compressed keys have read is restored after a rejection and read again",
        end=BEHIND_WINDOWS,
        reason="keep an index|compress keys",
        cases=(
            *repeats("axk2 deepseek_v32 glm_moe_dsa hy_v4", **LATENT),
            Case(
                "dots3_note_text",
                "",
                {
                    "layer_types": ["indexed_attention", "sliding_attention"],
                    "mlp_layer_types": ["dense", "sparse"],
                    "per_layer_config": None,
                    "head_dim": 16,
                    **LATENT,
                },
            ),
            Case(
                "deepseek_v4",
                "",
                {
                    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
                    "num_key_value_heads": 1,
                    "o_groups": 2,
                    "o_lora_rank": 8,
                    "index_topk": 8,
                },
            ),
            Case(
                "qwen4_exp_text",
                "",
                {
                    "layer_types": ["linear_attention", "indexed_attention"],
                    "indexer_n_heads": 16,
                    "indexer_kv_heads": 1,
                    "indexer_head_dim": 16,
                    "indexer_budget": 16,
                    "indexer_compress_ratio": 4,
                    "hc_lowrank": 8,
                },
            ),
        ),
    ),
    Family(
        "Recurrent layers, with attention or alone",
        chains=True,
        trees=False,
        note="states are saved before a draft and restored after a rejection; what was kept is read again",
        end=BEHIND_WINDOWS,
        reason="read tokens one after another|its forward takes no",
        cases=(
            *repeats("granitemoehybrid olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next", **RECURRENT),
            *repeats("bailing_hybrid kimi_linear", **RECURRENT, **LATENT),
            Case("bamba", "", {"attn_layer_indices": [1]}),
            *repeats("falcon_h1 inkling2_text inkling_text"),
            Case("granitemoehybrid", "dense", {**RECURRENT, "num_local_experts": 0, "num_experts_per_tok": 0}),
            Case("lfm2", "", CONVOLUTIONS),
            Case("lfm2_moe", "", {**CONVOLUTIONS, "num_dense_layers": 1}),
            Case("lfm3", "", CONVOLUTIONS),
            Case("lfm3", "window", {"layer_types": ["conv", "sliding_attention"]}),
            Case("mamba2", "", {"num_heads": 4, "head_dim": 16}),
            Case("zaya", "", {"num_experts_per_tok": 1}),
        ),
    ),
    Family(
        "Recurrent layers that take up their state in passes of one token",
        chains=True,
        trees=False,
        note="exact, and no faster than decoding token by token: a draft is read a token a pass",
        end=UNCHANGING,
        reason="read tokens one after another|its forward takes no",
        cases=(
            *repeats("falcon_mamba mamba"),
            Case(
                "jamba",
                "",
                {
                    "attn_layer_period": 2,
                    "attn_layer_offset": 1,
                    "expert_layer_period": 2,
                    "expert_layer_offset": 1,
                },
            ),
            Case(
                "nemotron_h",
                "",
                {
                    "num_hidden_layers": ...,
                    "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
                },
            ),
            Case(
                "zamba",
                "",
                {
                    "num_hidden_layers": 4,
                    "layers_block_type": ["linear_attention", "hybrid"] * 2,
                    "attention_hidden_size": 64,
                    "attention_head_dim": 16,
                    "n_mamba_heads": 2,
                    **LATENT,
                },
            ),
            Case(
                "zamba2",
                "",
                {
                    "num_hidden_layers": 3,
                    "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
                    "hybrid_layer_ids": [1],
                    "num_mem_blocks": 1,
                    "adapter_rank": 8,
                    **LATENT,
                },
            ),
        ),
    ),
)

REFUSED: tuple[Family, ...] = (
    Family(
        "Encoder-decoders whose scores go by the pass (ProphetNet, mixtures of experts), or by texts before (BigBird)",
        chains=False,
        trees=False,
        note="so drafts change what they are checked by. Take T5, BART, Marian or Pegasus",
        reason="other logits in a chain of candidates|drops tokens where an expert|changes its encoder for good",
        cases=(
            Case("prophetnet", "", {"pad_token_id": 0}, model="ProphetNetForConditionalGeneration"),
            Case("switch_transformers", "", model="SwitchTransformersForConditionalGeneration"),
            Case("nllb-moe", "", model="NllbMoeForConditionalGeneration"),
            Case("bigbird_pegasus", "seq2seq", model="BigBirdPegasusForConditionalGeneration"),
        ),
    ),
    Family(
        "Flex and flash attention",
        chains=False,
        trees=False,
        note="flex compiles a kernel for the mask of every draft, flash takes no masks of trees. "
        "`model.set_attn_implementation('sdpa')`, or `'eager'`",
        reason="uses the attention implementation 'flex_attention'",
        cases=(Case("llama", "flex", attention="flex_attention"),),
    ),
    Family(
        "No cache of keys and values (GPT, XLNet, XLM, Reformer)",
        chains=False,
        trees=False,
        note="every pass reads the whole text, or memories of another kind. Take a model with a cache, such as GPT-2",
        reason="keeps no cache of keys and values",
        cases=(
            *repeats("openai-gpt xlnet"),
            Case("reformer", "", {"axial_pos_embds": False}),
            Case("xlm", "", {"causal": True}),
        ),
    ),
    Family(
        "A cache of their own (RWKV, xLSTM, MiniMax Text 01)",
        chains=False,
        trees=False,
        note="of which no tokens can be taken back. Take a hybrid with transformers' cache, such as Qwen3-Next",
        reason="of its own",
        cases=(
            Case("minimax", "", {**LATENT, "layer_types": RECURRENT["layer_types"], "block_size": 16}),
            Case("rwkv"),
            Case("xlstm", "", {"num_heads": 4, "num_blocks": ..., "embedding_dim": 32}),
        ),
    ),
    Family(
        "States in the layers (RecurrentGemma)",
        chains=False,
        trees=False,
        note="which no cache can save. Take a hybrid with transformers' cache",
        reason="keeps its states in its layers",
        cases=(
            Case(
                "recurrent_gemma",
                "",
                {
                    "num_hidden_layers": 3,
                    "block_types": ["recurrent", "recurrent", "attention"],
                    "num_key_value_heads": 1,
                },
            ),
        ),
    ),
    Family(
        "A prompt of their own (CPM-Ant)",
        chains=False,
        trees=False,
        note="its places in the cache are not those of the text",
        reason="puts prompt tokens of its own before every text",
        cases=(Case("cpmant"),),
    ),
    Family(
        "Tokens routed together (Doge with experts)",
        chains=False,
        trees=False,
        note="so a draft changes the scores of what is before it. Take Doge without experts",
        reason="routes the tokens of a pass together",
        cases=(Case("doge", "moe", {"is_moe": True, "sliding_window": None}),),
    ),
    Family(
        "A window in the cache alone (Moshi)",
        chains=False,
        trees=False,
        note="the stock model lets a long prompt see all of itself, and later tokens the window",
        reason="cannot be decoded speculatively",
        cases=(Case("moshi"),),
    ),
)

FAMILIES = (*WITH_TREES, *IN_CHAINS, *REFUSED)
"""All of them."""
