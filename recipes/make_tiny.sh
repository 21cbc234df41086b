#!/bin/sh
# Make every model, tokeniser and prompt set that the package ships, from nothing. Run it from the repository root.
# It needs Debian or a relative (`python -m recipes.corpus --help` names another way to get the text) and about one and
# a half hours of two CPU cores. The wall-clock budgets keep it there on a busy machine, at the price of exact
# repeatability; without --minutes every run ends by tokens and can be repeated exactly.
# A run that was interrupted goes on where it was when this script is started again.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models

recipe() {
    name=$1
    shift
    "$PYTHON" -m "recipes.$name" "$@"
}

target() {
    recipe target --tokenizer $MODELS/tokenizer --licence mit --threads 2 --learning-rate 5e-3 "$@"
}

draft() {
    "$PYTHON" -m specgym.decoding.fit draft --licence mit --threads 2 "$@"
}

text() {
    # The text of runs/corpus is kept if it is there: the models below are tied to it by its digest.
    [ -f runs/corpus/corpus.json ] || recipe corpus
    [ -f $MODELS/tokenizer/tokenizer.json ] || recipe tokenizer --out $MODELS/tokenizer
    recipe prompts --tokenizer $MODELS/tokenizer --out decoding/data/prompts
}

models() {
    target --out $MODELS/tiny-10m --tokens 8000000 --minutes 45
    target --out $MODELS/tiny-3m --hidden 192 --intermediate 512 --layers 6 --heads 3 --tokens 5000000 --minutes 9
    draft --target $MODELS/tiny-10m --out $MODELS/tiny-10m-draft-2l --take 0 11 --tokens 4000000 --minutes 9
    draft --target $MODELS/tiny-10m --out $MODELS/tiny-10m-draft-1l --take 0 --tokens 3000000 --minutes 8
    draft --target $MODELS/tiny-10m --out $MODELS/tiny-10m-draft-xs --hidden 64 --tokens 3000000 --minutes 7 \
        --learning-rate 5e-3
    draft --target $MODELS/tiny-3m --out $MODELS/tiny-3m-draft-1l --take 0 --tokens 3000000 --minutes 5
}

text
models
