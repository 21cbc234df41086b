"""Seeded damage to files of every format: flipped bytes, cut ends, other values, other arrays, other tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from specgym.decoding import read_arrays, write_arrays
from tests.helpers.sealing import reseal

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 1.5, -0.5, 2**31, 2**63, 10**30, 1e308, 1e-308, float("nan"), float("inf"), "", "x",
    "..", "\0", [], {}, [1], [[[]]], {"a": 1}, [None] * 9, "specgym-x-1",
)  # fmt: skip
"""Values that a JSON value is swapped for."""


def flip(path: Path, rng: random.Random) -> None:
    """Flip some bits of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 4))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def cut(path: Path, rng: random.Random) -> None:
    """Cut a file's end off, or a piece out of it, or repeat a piece."""
    data = path.read_bytes()
    first, second = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    path.write_bytes(rng.choice((data[:first], data[:first] + data[second:], data[:second] + data[first:])))


def swap(path: Path, rng: random.Random) -> None:
    """Swap, drop or add a value of a JSON object."""
    content = json.loads(path.read_text(encoding="utf-8"))
    places = list(_places(content))
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.append(rng.choice(STRANGE))
        case 2:
            other, name = rng.choice(places)
            holder[key] = other[name]
        case 3 if type(holder[key]) in (int, float):
            holder[key] = rng.choice((holder[key] + 1, -holder[key], holder[key] * 1.01, holder[key] * 10**9))
        case 4 if isinstance(holder, dict):
            holder[rng.choice(("", "x", str(key) + "x"))] = holder[key]
        case _:
            holder[key] = rng.choice(STRANGE)
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
    except ValueError:  # a value was put into itself
        path.write_text("[" * 100_000, encoding="utf-8")


def change_array(path: Path, rng: random.Random) -> None:
    """Change one array of an archive, which has a checksum that fits afterwards."""
    arrays = dict(read_arrays(path).arrays)
    name = rng.choice(list(arrays))
    if arrays[name].dtype.kind == "U":
        text = path.with_suffix(".json")
        text.write_text(str(arrays[name]), encoding="utf-8")
        swap(text, rng)
        arrays[name] = np.array(text.read_text(encoding="utf-8"))
        text.unlink()
    else:
        arrays[name] = _changed(arrays[name], rng)
        if rng.random() < 0.1:
            del arrays[name]
    write_arrays(path, arrays)


def change_tensor(path: Path, rng: random.Random) -> None:
    """Change one tensor of a safetensors file."""
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    if rng.random() < 0.1:
        del tensors[name]
    else:
        tensors[name] = torch.from_numpy(np.array(_changed(tensors[name].numpy(), rng)))
    save_file(tensors, path, metadata={"format": "pt"})


def _changed(array: np.ndarray, rng: random.Random) -> np.ndarray:
    changed = np.array(array)
    kinds: list[Callable[[], np.ndarray]] = [
        lambda: changed.reshape(-1),
        lambda: changed[None],
        lambda: changed[:0],
        lambda: changed[: len(changed) // 2],
        lambda: changed.astype(rng.choice((np.float64, np.float32, np.float16, np.int8, np.uint8, np.bool_))),
        lambda: np.concatenate([changed, changed]),
        lambda: -changed,
        lambda: np.zeros((0, 10**15)),
    ]
    if rng.random() < 0.5 and changed.size:
        values: Any = (0, 1, 3, 127) if changed.dtype.kind in "biu" else (0.5, -1.0, np.nan, np.inf, 60000.0)
        changed.reshape(-1)[rng.randrange(changed.size)] = rng.choice(values)
        return changed
    try:
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(rng.choice(kinds)())
    except (TypeError, ValueError, IndexError):
        return changed


def _places(value: Any) -> Any:
    """Every place of nested JSON, as what holds it and its key."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from _places(entry)


__all__ = ["change_array", "change_tensor", "cut", "flip", "reseal", "swap"]
