#!/usr/bin/env bash
# transformers 5.23.0: with rope_type "longrope" the next token depends on how much of a text was the prompt. Every pass
# rotates all its tokens by the factors of its last position, and what is in the cache stays as it was rotated. Phi-3
# drops its cache when it passes original_max_position_embeddings; any other architecture with such a rotation (a Llama
# here) goes on with short keys, so that the very same tokens, given as a prompt, are continued otherwise than they were.
# Seen: the scores of the same token differ by 3.2e+00 standard deviations for Llama, by 5.8e-06 for Phi-3.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "transformers==5.23.0" "torch==2.13.0" "numpy<3"
"$place/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

SWITCH = 32
ROTATION = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.1, 1.3, 2.0, 5.0, 15.0, 35.0, 60.0],
    "original_max_position_embeddings": SWITCH,
}


def last_scores(model, prompt, count):
    """Tokens of the greedy text, and the scores of its last one."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, out.logits[-1][0]


def disagreement(kind, config):
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=128,
            original_max_position_embeddings=SWITCH,
            rope_parameters=dict(ROTATION),
            initializer_range=0.25,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    prompt = torch.arange(5, 25).unsqueeze(0)
    text, written = last_scores(model, prompt, 40)  # 20 tokens of prompt, 60 in the end
    _, given = last_scores(model, text[:, :-1], 1)  # the same 59 tokens as a prompt
    return float((written - given).abs().max() / given.std())


seen = {"Llama": disagreement(LlamaForCausalLM, LlamaConfig), "Phi-3": disagreement(Phi3ForCausalLM, Phi3Config)}
for name, size in seen.items():
    print(f"{name}: scores of the same token as written and as prompted differ by {size:.1e} standard deviations")
assert seen["Llama"] > 1e-2, "Llama with longrope no longer depends on what was the prompt"
assert seen["Phi-3"] < 1e-4, "Phi-3 depends on what was the prompt now"
PYTHON
