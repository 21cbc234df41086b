#!/bin/sh
# Make the alignments and acceptance predictors that the package ships for its own drafts. Run it from the repository
# root, after make_tiny.sh or with its runs/corpus; names of drafts as arguments make only theirs:
# recipes/make_draft_tree.sh tiny-3m-draft-1l. It needs about an hour of one idle CPU core, less after
# make_medusa.sh, with which it shares the targets' own text. Runs end by tokens, so that they can be repeated exactly.
# A run that was interrupted goes on where it was when this script is started again.
set -eu

PYTHON=${PYTHON:-python}
MODELS=decoding/data/models

fit() {
    command=$1
    shift
    "$PYTHON" -m specgym.decoding.fit "$command" --target "$target" --draft "$draft" --out "$MODELS/$draft-$command" \
        --licence mit --threads 1 --prompt-tokens 64 --new-tokens 64 --generate-batch 128 --texts "$texts" "$@"
}

[ -f runs/corpus/corpus.json ] || "$PYTHON" -m recipes.corpus
[ $# -gt 0 ] || set -- tiny-3m-draft-1l tiny-10m-draft-1l tiny-10m-draft-2l tiny-10m-draft-xs tiny-3m
for draft in "$@"; do
    case $draft in
        tiny-3m-draft-1l) target=tiny-3m texts=3072 ;;
        tiny-10m-draft-1l | tiny-10m-draft-2l | tiny-10m-draft-xs | tiny-3m) target=tiny-10m texts=6144 ;;
        *) echo "nothing is made for $draft here: see the drafts in this script" >&2 && exit 1 ;;
    esac
    fit alignment --tokens 500000
    fit acceptance --tokens 400000
done
