#!/usr/bin/env bash
# torch 2.13.0 on Linux x86, transparent huge pages at "madvise" (which most distributions choose): torch's own switch for
# huge pages, THP_MEM_ALLOC_ENABLE=1, reaches tensors but not one byte of the packed weights of layers quantised to float16
# (torch.ao.quantization.quantize_dynamic(..., dtype=torch.float16)): FBGEMM allocates by itself. In a model that is
# quantised to be fast those are nearly all that a pass reads, on pages of 4 kB.
#
# Way out: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (glibc 2.35) in the environment of the process, which reaches both.
#
# Output seen:
#   by default                                tensors 0 of 192 MiB, float16 weights 0 of 96 in huge pages
#   THP_MEM_ALLOC_ENABLE=1                    tensors 168 of 192 MiB, float16 weights 0 of 96 in huge pages
#   GLIBC_TUNABLES=glibc.malloc.hugetlb=1     tensors 168 of 192 MiB, float16 weights 184 of 96 in huge pages
# (more than the weights: what they were made of has been freed into such pages, too)
set -euo pipefail
grep -q '\[madvise\]' /sys/kernel/mm/transparent_hugepage/enabled || { echo "needs huge pages at madvise" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 "numpy<3"
cd "$work"
cat > measure.py <<'PYTHON'
import sys
from pathlib import Path

import torch
from torch import nn

OUTPUTS, INPUTS, LAYERS = 4096, 1024, 12


def in_huge_pages():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")) / 1024


def quantised():
    layer = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.float16)


torch.set_num_threads(1)
way, in_use, shown, kept = sys.argv[1], [], [], []
for name, make, size in (
    ("tensors", lambda: torch.ones(OUTPUTS, INPUTS), 4),
    ("float16 weights", quantised, 2),
):
    before, whole = in_huge_pages(), size * OUTPUTS * INPUTS * LAYERS / 2**20
    kept += [make() for _ in range(LAYERS)]
    there = in_huge_pages() - before
    in_use.append(there > whole / 2)
    shown.append(f"{name} {there:.0f} of {whole:.0f}" + " MiB" * (not shown))
print(f"{way:41} " + ", ".join(shown) + " in huge pages")
expected = {"by default": [False, False], "THP_MEM_ALLOC_ENABLE=1": [True, False]}.get(way, [True, True])
if in_use != expected:
    raise SystemExit("torch behaves otherwise now")
PYTHON
unset THP_MEM_ALLOC_ENABLE GLIBC_TUNABLES
"$work/venv/bin/python" -W ignore measure.py "by default"
for choice in THP_MEM_ALLOC_ENABLE=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1; do
    env "$choice" "$work/venv/bin/python" -W ignore measure.py "$choice"
done
