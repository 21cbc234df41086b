#!/bin/sh
# Make the alignments and acceptance predictors that the package ships for its own drafts. Run it from the repository
# root, after make_tiny.sh or with its runs/corpus; names of targets as arguments make only those:
# decoding/fit/make_draft_tree.sh tiny-3m. It needs about half an hour of one idle CPU core, less after make_medusa.sh,
# with which it shares the targets' own text. Runs end by tokens, so that they can be repeated exactly.
# A run that was interrupted goes on where it was when this script is started again.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models

fit() {
    command=$1 target=$2
    shift 2
    "$PYTHON" -m specgym.decoding.fit "$command" --target "$target" --draft "$target-draft-1l" \
        --out "$MODELS/$target-draft-1l-$command" --licence mit --threads 1 \
        --prompt-tokens 64 --new-tokens 64 --generate-batch 128 "$@"
}

[ -f runs/corpus/corpus.json ] || "$PYTHON" -m specgym.decoding.fit corpus
[ $# -gt 0 ] || set -- tiny-3m tiny-10m
for name in "$@"; do
    case $name in
        tiny-3m) texts=3072 ;;
        tiny-10m) texts=6144 ;;
        *) echo "nothing is made for $name here: tiny-3m or tiny-10m" >&2 && exit 1 ;;
    esac
    fit alignment "$name" --texts $texts --tokens 500000
    fit acceptance "$name" --texts $texts --tokens 400000
done
