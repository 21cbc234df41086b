#!/usr/bin/env bash
# torch 2.13.0: what torch.jit.trace makes is never freed. The class and the graph of every traced module are kept in one
# compilation unit of the process (torch.jit._state._python_cu), with the plans of the graph once it has run, and for each
# node the Python stack that it was traced under. Nothing of that goes with the module: a process that traces again, as a
# model's weights or shapes change, grows by some 17 kB for each operation, every time, though each module is deleted.
#
# Way out: none in the API; trace few shapes, and each once. (A module whose trace is made while torch.jit._state._python_cu
# is another compilation unit does go with it.)
#
# Output seen:
#   700 operations, traced and deleted 20 times: 11.8 MB more each time
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 "numpy<3"
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import ctypes
import gc
from pathlib import Path

import torch
from torch import nn

LAYERS, TIMES = 100, 20


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(8, 8), requires_grad=False) for _ in range(LAYERS))

    def forward(self, x):
        for weight in self.weights:
            x = (x @ weight).tanh()
            x = torch.cat([x[:, :4].neg(), x[:, 4:]], 1) * x
        return x


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


torch.set_num_threads(1)
model, inputs = Deep().eval(), torch.randn(1, 8)
with torch.inference_mode():
    for number in range(5 + TIMES):
        if number == 5:
            before = resident()
        traced = torch.jit.trace(model, (inputs,), check_trace=False)
        for _ in range(3):
            traced(inputs)
        del traced
growth = (resident() - before) / TIMES
print(f"{7 * LAYERS} operations, traced and deleted {TIMES} times: {growth:.1f} MB more each time")
if growth < 5:
    raise SystemExit("torch behaves otherwise now: traces are freed, or take less")
PYTHON
