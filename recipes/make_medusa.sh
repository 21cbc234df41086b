#!/bin/sh
# Make the Medusa heads that the package ships for its own targets. Run it from the repository root, after make_tiny.sh
# or with its runs/corpus; names as arguments make only those: recipes/make_medusa.sh tiny-3m.
# It needs about half an hour of one idle CPU core. Runs end by tokens, so that they can be repeated exactly.
# A run that was interrupted goes on where it was when this script is started again, and the targets' own text is kept.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models

medusa() {
    name=$1
    shift
    "$PYTHON" -m specgym.decoding.fit medusa --target "$name" --out "$MODELS/$name-medusa" --licence mit --threads 1 \
        --prompt-tokens 64 --new-tokens 64 --generate-batch 128 --learning-rate 2e-3 --batch 2 --length 256 \
        --tree-size 32 "$@"
}

[ -f runs/corpus/corpus.json ] || "$PYTHON" -m recipes.corpus
[ $# -gt 0 ] || set -- tiny-3m tiny-10m
for name in "$@"; do
    case $name in
        tiny-3m) medusa tiny-3m --texts 3072 --tokens 800000 ;;
        tiny-10m) medusa tiny-10m --texts 6144 --tokens 1200000 ;;
        *) echo "no heads are made for $name here: tiny-3m or tiny-10m" >&2 && exit 1 ;;
    esac
done
