#!/usr/bin/env bash
# PPO of skrl 2.1.1, with its defaults, carries rewards back over the end of an episode that a time limit cut off.
#
# `time_limit_bootstrap=False`, the default of PPO_CFG, reads as if a truncated episode counted as an ended one, without a
# bootstrap. It is the other way round: ends are then only those with `terminated` (skrl/agents/torch/ppo/ppo.py,
# compute_gae), so the advantages and returns of an episode that was truncated contain the next episode's rewards, with
# gamma * lambda as if nothing had happened. Environments that only ever truncate have no ends at all.
#
# Seen with skrl==2.1.1, torch==2.13.0 (CPU), Python 3.11: two episodes of 2 steps, cut by a time limit; rewards 1, 1 and
# then 0, 0 or 100, 100; gamma and lambda 1, values 0. Returns:
#   default              [2.0, 1.0, 0.0, 0.0] and [202.0, 201.0, 200.0, 100.0]
#   time_limit_bootstrap [2.0, 1.0, 0.0, 0.0] and [2.0, 1.0, 200.0, 100.0]
# Exits with 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "skrl==2.1.1" torch==2.13.0
cat > "$folder/limits.py" <<'PYTHON'
import torch
from skrl.agents.torch.ppo import PPO_CFG
from skrl.agents.torch.ppo.ppo import compute_gae


def returns(second, bootstrap):
    def column(numbers, kind=torch.float32):
        return torch.tensor(numbers, dtype=kind).reshape(-1, 1, 1)

    seen, _ = compute_gae(
        rewards=column([1.0, 1.0, *second]),
        terminated=column([0, 0, 0, 0], torch.bool),
        truncated=column([0, 1, 0, 1], torch.bool),
        values=column([0.0] * 4),
        last_values=column([0.0])[0],
        discount_factor=1.0,
        lambda_coefficient=1.0,
        time_limit_bootstrap=bootstrap,
    )
    return seen.flatten().tolist()


assert PPO_CFG().time_limit_bootstrap is False, "skrl has changed"
lines = [[returns(second, bootstrap) for second in ([0.0, 0.0], [100.0, 100.0])] for bootstrap in (False, True)]
for name, pair in zip(("default             ", "time_limit_bootstrap"), lines, strict=True):
    print(name, *pair)
first = [2.0, 1.0, 0.0, 0.0]
assert lines == [[first, [202.0, 201.0, 200.0, 100.0]], [first, [2.0, 1.0, 200.0, 100.0]]], "skrl has changed"
PYTHON
"$folder/venv/bin/python" "$folder/limits.py" 2> "$folder/log" || { tail -20 "$folder/log" >&2; exit 1; }
