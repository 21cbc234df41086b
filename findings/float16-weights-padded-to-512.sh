#!/usr/bin/env bash
# torch 2.13.0 on x86: dynamic quantisation to float16 (torch.ao.quantization.quantize_dynamic(..., dtype=torch.float16), or
# torch.ops.quantized.linear_prepack_fp16) need not save memory, and can take more than the float32 weights that it
# replaces. FBGEMM cuts a packed weight into blocks of 512 inputs and allocates every block whole, so that a layer takes
# 2 * ceil(inputs / 512) * 512 bytes for each output: half of float32 at 512 and 1,024 inputs, nine tenths at 576 (the
# width of SmolLM2-135M), as much at 256, twice as much at 128. state_dict() shows none of it, as it unpacks. A pass reads
# only what is filled, so that it is as fast as the bytes of float16 promise.
#
# Way out: none in the API; choose float16 weights for their speed, and count 512 inputs a block when planning memory.
#
# Output seen:
#   512 inputs: packed weights take 0.50 of the float32 ones
#   576 inputs: packed weights take 0.89 of the float32 ones
#   256 inputs: packed weights take 1.00 of the float32 ones
#   128 inputs: packed weights take 2.00 of the float32 ones
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 "numpy<3"
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import ctypes
import gc
import math
from pathlib import Path

import torch
from torch import nn

OUTPUTS, LAYERS = 16_384, 12


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Once(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def quantised(inputs):
    """A layer in float16; the weight that it was made of is freed."""
    with torch.no_grad():
        model = Once(nn.Linear(inputs, OUTPUTS, bias=False))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.float16, inplace=True)


quantised(64)  # what is set up once
for inputs in (512, 576, 256, 128):
    before = resident()
    kept = [quantised(inputs) for _ in range(LAYERS)]
    share = (resident() - before) / (LAYERS * 4 * inputs * OUTPUTS)
    print(f"{inputs} inputs: packed weights take {share:.2f} of the float32 ones")
    expected = 2 * math.ceil(inputs / 512) * 512 / (4 * inputs)
    if abs(share - expected) > 0.1:
        raise SystemExit(f"torch behaves otherwise now: blocks of 512 would take {expected:.2f}")
    del kept
PYTHON
