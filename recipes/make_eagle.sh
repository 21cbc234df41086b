#!/bin/sh
# Make the EAGLE heads that the package ships. Run it from the repository root, after make_tiny.sh or with its
# runs/corpus; names as arguments make only those: recipes/make_eagle.sh tiny-3m. It needs about two hours of one idle
# CPU core, most of it for SmolLM2: its own text and chats, their hidden states, and the training.
# A run that was interrupted goes on where it was when this script is started again, and text is kept.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models

fit() {
    target=$1
    shift
    "$PYTHON" -m specgym.decoding.fit eagle --target "$target" --threads 1 --prompt-tokens 64 --check-steps 100 \
        --patience 0 --out "$MODELS/$target-eagle" "$@"
}

[ -f runs/corpus/corpus.json ] || "$PYTHON" -m recipes.corpus
[ $# -gt 0 ] || set -- tiny-3m tiny-10m smollm2
for name in "$@"; do
    case $name in
        tiny-3m)
            fit tiny-3m --licence mit --texts 2048 --new-tokens 64 --generate-batch 128 --vocabulary 2048 --store int8 \
                --tokens 1500000 --compared-with tiny-3m-draft-1l
            ;;
        tiny-10m)
            fit tiny-10m --licence mit --texts 2048 --new-tokens 64 --generate-batch 128 --vocabulary 2048 --store int8 \
                --tokens 1300000 --compared-with tiny-10m-draft-1l tiny-10m-draft-2l
            ;;
        smollm2)
            fit smollm2 --licence apache-2.0 --dtype bfloat16 --texts 768 --new-tokens 96 --generate-batch 64 \
                --vocabulary 8000 --own-prompts 2560 --answer-tokens 128 --prompt-sets chat --each 2 \
                --tokens 1500000 --minutes 26 --store int8 --compared-with smollm2-draft-2l smollm2-draft-4l
            ;;
        *) echo "no $name is made here: tiny-3m, tiny-10m or smollm2" >&2 && exit 1 ;;
    esac
done
