#!/usr/bin/env bash
# transformers 5.23.0: `generate()` makes the decoder's cache of a T5 (also UMT5) with as many layers as the *encoder* has.
# T5Config has a number for each, num_layers and num_decoder_layers, and the attribute that stands for both elsewhere,
# num_hidden_layers, is the encoder's. A decoder of fewer layers gets too many and works; one of more layers than the
# encoder, which trains and runs forward with a cache of its own, fails at the first generated token with
# "IndexError: list index out of range". BART, with encoder_layers and decoder_layers, generates either way.
#
# Way out: give generate() a cache that grows by itself, past_key_values=EncoderDecoderCache(DynamicCache(),
# DynamicCache()), or use_cache=False, which reads the whole text again for every token.
#
# Output seen:
#   T5 of 4 and 2 layers: generate gives 6 tokens
#   T5 of 2 and 4 layers: forward with a cache works; generate fails (IndexError: list index out of range)
#   T5 of 2 and 4 layers, a cache that grows: generate gives 6 tokens, those of use_cache=False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 "numpy<3"
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

SOURCE = torch.tensor([[5, 6, 7, 8]])


def model(encoder, decoder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "tie_word_embeddings": False}
    layers = {"num_layers": encoder, "num_decoder_layers": decoder, "initializer_factor": 4.0}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    return T5ForConditionalGeneration(T5Config(**sizes, **layers, **ends)).eval()


def generated(t5, **options):
    return t5.generate(SOURCE, max_new_tokens=6, do_sample=False, **options)[0, 1:].tolist()


print(f"T5 of 4 and 2 layers: generate gives {len(generated(model(4, 2)))} tokens")
deep = model(2, 4)
deep(input_ids=SOURCE, decoder_input_ids=torch.tensor([[0]]), use_cache=True)
try:
    generated(deep)
except IndexError as error:
    print(f"T5 of 2 and 4 layers: forward with a cache works; generate fails (IndexError: {error})")
else:
    raise SystemExit("transformers behaves otherwise now: a T5 whose decoder is deeper than its encoder generates")
growing = generated(deep, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
same = "those" if growing == generated(deep, use_cache=False) else "not those"
print(f"T5 of 2 and 4 layers, a cache that grows: generate gives {len(growing)} tokens, {same} of use_cache=False")
if same != "those":
    raise SystemExit("the way out gives another text")
PYTHON
