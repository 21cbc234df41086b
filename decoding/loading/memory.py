"""Memory that a pair takes.

Weights are counted as they lie in memory: parameters, buffers, prepacked and quantised layers of the target, and of
the draft what it does not share with the target; of a draft that is a table, the table. Keys and values are measured by
reading a token. What is allocated at the peak cannot be told apart by pairs: on CUDA it is the most that torch ever had
allocated on the target's devices since the process began (or since `torch.cuda.reset_peak_memory_stats`), on a CPU the
largest resident memory of the process, with Python, its libraries and all that was loaded. Processes of environments
are not in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..drafts.mixed import draft_models
from ..models.early_exit import ExitModel
from ..models.identity import tensors_in
from ..models.language_model import LanguageModel
from ..models.linear_layers import PrepackedLinear, only_looking
from ..models.supported import is_dynamic
from .pair import Pair


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a pair takes.

    Attributes:
        pair: name of the pair.
        target: of the target's weights.
        draft: of the draft's weights beside the target's; 0 for none and for drafts that copy from the text.
        per_token: of keys and values for every token of a text, of all models.
        peak: most that was in use so far, by everything; None where the system does not say.
        peak_of: what the peak is of: `process`, or the CUDA devices.
    """

    pair: str
    target: int
    draft: int
    per_token: int
    peak: int | None
    peak_of: str

    def __str__(self) -> str:
        text = f"{self.pair}: weights {_amount(self.target)} (target)"
        text += f" + {_amount(self.draft)} (draft)" if self.draft else ""
        text += f", keys and values {_amount(self.per_token)} a token"
        if self.peak is None:
            return text
        whole = "resident in this process, Python included" if self.peak_of == "process" else f"on {self.peak_of}"
        return f"{text}; peak {_amount(self.peak)} {whole}"


def memory_of(pair: Pair) -> MemoryUse:
    """Count the memory of a pair and read the peak so far; after decoding that is the peak of decoding.

    Args:
        pair: loaded, with or without a draft.
    """
    models = draft_models(pair.draft)
    target = dict(_parts(pair.target.model))
    draft = dict(part for model in models for part in _parts(model.model))
    beside = sum(size for place, size in draft.items() if place not in target)
    caches = [pair.target, *(model for model in models if not isinstance(model, ExitModel))]
    per_token = sum(map(_bytes_per_token, caches))
    peak, peak_of = _peak(pair.target.model)
    table = int(getattr(pair.draft, "nbytes", 0))
    return MemoryUse(pair.name, sum(target.values()), beside + table, per_token, peak, peak_of)


def _parts(model: nn.Module) -> Iterator[tuple[object, int]]:
    """Every storage of a model's weights with its bytes, by what tells it from others."""
    with only_looking():
        tensors = (*model.parameters(), *model.buffers())
    for tensor in tensors:
        storage = tensor.untyped_storage()
        yield (tensor.device, storage.data_ptr()), storage.nbytes()
    for module in model.modules():
        if isinstance(module, PrepackedLinear):
            yield module, module.packed.nbytes
        elif is_dynamic(module) or getattr(module, "rounds_inputs", False):
            packed = (part for value in module.state_dict().values() for part in tensors_in(value))
            yield module, sum(part.numel() * part.element_size() for part in packed)


def _bytes_per_token(model: LanguageModel) -> int:
    trial = model.begin([0])[0].fresh()
    trial.forward(torch.zeros(1, dtype=torch.int64, device=model.device))
    return trial.cache_bytes


def _peak(model: nn.Module) -> tuple[int | None, str]:
    with only_looking():
        devices = sorted({str(weight.device) for weight in model.parameters() if weight.device.type == "cuda"})
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices), " and ".join(devices)
    return _peak_resident(), "process"


def _peak_resident() -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ImportError:  # Windows
        return None
    usage: Any = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _amount(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
