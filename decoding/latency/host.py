"""Description of the host: device, threads, types, versions."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from ..drafts.drafter import ModelDrafter
from ..loading.pair import Pair
from ..models.language_model import LanguageModel, decoding_threads
from ..models.prepack import PrepackedLinear


def describe_hardware(pair: Pair) -> dict[str, Any]:
    """Device and software that time a pair: `device`, `name`, `threads`, `dtype`, `prepacked`, `torch`, `version`."""
    device = pair.target.device
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": decoding_threads(),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
        "prepacked": any(isinstance(module, PrepackedLinear) for module in pair.target.model.modules()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def fingerprint(pair: Pair) -> str:
    """Twelve hexadecimal digits for a pair on this hardware; another size of model or number of threads has others."""
    draft = pair.draft
    parts: dict[str, Any] = {
        "hardware": describe_hardware(pair),
        "pair": pair.name,
        "target": _shape(pair.target),
        "draft": type(draft).__name__,
    }
    if isinstance(draft, ModelDrafter):
        parts["draft"] = _shape(draft.model)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _shape(model: LanguageModel) -> dict[str, Any]:
    config = model.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # a copy elsewhere is as fast
        config.pop(name, None)
    return {"config": config, "device": str(model.device), "dtype": str(model.dtype)}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
