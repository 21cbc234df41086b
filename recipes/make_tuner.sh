#!/bin/sh
# Make the tuner that the package ships, and the tables of docs/tuner.md. Run it from the repository root. Five policies
# are learned, some five minutes each on a core, and judged in worlds that they never saw; the first one ships. Then
# it is tried by the clock on six real pairs, for which the machine should do nothing else. Last come tuners of the other
# decoders, an hour on two cores. A run that was interrupted goes on where it was when this script is started again.
set -eu

PYTHON=${PYTHON:-python}
RUN=runs/worlds
LIVE=runs/worlds-live

if [ -d "$RUN" ]; then
    "$PYTHON" train.py --resume "$RUN"
else
    "$PYTHON" train.py --env specgym/SpeculativeWorlds-v0 --seeds 0 1 2 3 4 --name worlds
fi
"$PYTHON" -m recipes.tuner "$RUN"
"$PYTHON" -m benchmarks.worlds_live --out "$LIVE" > "$LIVE.md"
"$PYTHON" -m recipes.tuner "$RUN" --live "$LIVE.md"

# How well tuners of the other decoders do on pairs that were left out; the tables are printed.
for env in Thresholds Speculative Lookahead Medusa DraftTree; do
    [ -d "runs/tuner-$env" ] || "$PYTHON" train.py --tuner --env "specgym/$env-v0" --name "tuner-$env"
    "$PYTHON" evaluate.py "runs/tuner-$env" --transfer --leave-out pair --seeds 0
done
