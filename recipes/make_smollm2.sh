#!/bin/sh
# Make the Medusa heads and the drafts that the package ships for SmolLM2-135M-Instruct. Run it from the repository
# root, after make_tiny.sh or with its runs/corpus; names as arguments make only those:
# recipes/make_smollm2.sh draft-2l. It needs about three hours of one idle CPU core, half of it for the text that
# SmolLM2 writes or reads and all of them learn from. Runs end by tokens, so that they can be repeated exactly.
# A run that was interrupted goes on where it was when this script is started again, and SmolLM2's own text is kept.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models

fit() {
    command=$1
    shift
    "$PYTHON" -m specgym.decoding.fit "$command" --target smollm2 --licence apache-2.0 --threads 1 \
        --texts 2048 --prompt-tokens 64 --new-tokens 96 --generate-batch 64 --vocabulary 8000 "$@"
}

draft() {
    layers=$1 tokens=$2
    shift 2
    fit draft --out "$MODELS/smollm2-draft-${layers}l" --own-text --plain-texts 4096 --prompt-sets chat --continuations 8 \
        --layers "$layers" --batch 8 --tokens "$tokens" --learning-rate 1e-2 --store int8 --report-prompts 6 "$@"
}

[ -f runs/corpus/corpus.json ] || "$PYTHON" -m recipes.corpus
[ $# -gt 0 ] || set -- heads draft-2l draft-4l
for name in "$@"; do
    case $name in
        heads)
            fit medusa --out $MODELS/smollm2-135m-instruct-medusa --learning-rate 1e-3 --batch 2 --length 256 --tree-size 32 \
                --tokens 800000
            ;;
        draft-2l) draft 2 3000000 ;;
        draft-4l) draft 4 2400000 --intermediate 1024 ;;
        *) echo "no $name is made here: heads, draft-2l or draft-4l" >&2 && exit 1 ;;
    esac
done
