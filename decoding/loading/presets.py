"""Named target-draft pairs, and how a pair's name is read. Free of torch.

Type and device of models: what a command asks for holds in its process and in those it starts.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ..errors import SpecgymError

NGRAM = "ngram"
PROMPT_LOOKUP = "prompt-lookup"
SUFFIX = "suffix"
DRAFTED_BY = ":drafted-by-"
"""Between the names of a draft model and of the table or look-up that drafts for it (`CascadeDrafter`)."""
EARLY_EXIT = "early-exit:"
"""Beginning of the name of a draft that is so many first layers of the target (`EarlyExit`)."""
EAGLE = "eagle.json"
"""File that describes an EAGLE head in its folder."""
INT8 = ":int8"
"""End of the name of a draft model whose linear layers are to be quantised."""
DEFAULT = "tiny"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Hub id of the chat model that can also be fetched from the package index (`smollm2`)."""
ModelType = Literal["float32", "bfloat16", "float16"]
"""Types of weights that a command can ask for."""
DTYPES: Final = ("float32", "bfloat16", "float16")
_NO_MODELS = (NGRAM, PROMPT_LOOKUP, SUFFIX)
_VARIABLES = ("SPECGYM_DTYPE", "SPECGYM_DEVICE")
"""Environment variables that tell processes started later; they are set here, and not meant for users."""
_DEVICE = re.compile(r"cpu|auto|(cuda|xpu|mps)(:\d+)?")
_SHIPPED = Path(__file__).parents[1] / "data" / "models"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class UnknownPairError(SpecgymError, ValueError):
    """A name that is neither a preset, nor ``target+draft``, nor a target; the message lists the presets."""


@dataclass(frozen=True)
class PairPreset:
    """Which target goes with which draft.

    Attributes:
        name: of the preset, or ``target+draft``.
        target: a model's name, as `load_model` takes it.
        draft: another model's name, ``ngram`` (a table counted on text), ``prompt-lookup`` (copied from the text so
            far) or ``suffix`` (what most often followed there), or several of these with commas between them; None for
            a target alone. ``early-exit:6`` is so many layers of the target; the folder of an EAGLE head may stand for
            a model's. A draft model's name may end in ``:int8``, and then in ``:drafted-by-ngram`` and the like.
        doc: one line on what the pair is for.
    """

    name: str
    target: str
    draft: str | None
    doc: str

    @property
    def drafts(self) -> tuple[str, ...]:
        """Names of the drafts, in the order of preference."""
        return () if self.draft is None else tuple(self.draft.split(","))

    @property
    def draft_is_model(self) -> bool:
        """True if the draft is a single language model that is taken as it stands, as engines can take it, too."""
        (draft, *others) = self.drafts or (NGRAM,)
        changed = DRAFTED_BY in draft or draft.endswith(INT8) or draft.startswith(EARLY_EXIT)
        return not (others or changed or draft in _NO_MODELS or head_folder(draft))


_LLAMA = "meta-llama/Llama-3.1-{}-Instruct"

PRESETS: dict[str, PairPreset] = {
    preset.name: preset
    for preset in (
        PairPreset("tiny", "tiny-10m", "tiny-10m-draft-1l", "the default: shipped, distilled one-layer draft"),
        PairPreset("tiny-10m-2l", "tiny-10m", "tiny-10m-draft-2l", "shipped; two layers: better guesses, dearer"),
        PairPreset("tiny-10m-xs", "tiny-10m", "tiny-10m-draft-xs", "shipped; the cheapest and least accurate draft"),
        PairPreset("tiny-10m-3m", "tiny-10m", "tiny-3m", "shipped; a draft that was trained apart, not distilled"),
        PairPreset("tiny-10m-eagle", "tiny-10m", "tiny-10m-eagle", "shipped; a head that reads the target's states"),
        PairPreset("tiny-10m-ngram", "tiny-10m", NGRAM, "shipped; an n-gram table as draft"),
        PairPreset("tiny-10m-lookup", "tiny-10m", PROMPT_LOOKUP, "shipped; drafts copied from the text so far"),
        PairPreset("tiny-3m-1l", "tiny-3m", "tiny-3m-draft-1l", "shipped; the smallest target, one-layer draft"),
        PairPreset("tiny-3m-eagle", "tiny-3m", "tiny-3m-eagle", "shipped; the smallest target, a head on its states"),
        PairPreset("tiny-3m-ngram", "tiny-3m", NGRAM, "shipped; the smallest target, an n-gram table as draft"),
        PairPreset("tiny-3m-lookup", "tiny-3m", PROMPT_LOOKUP, "shipped; the smallest target, drafts copied"),
        PairPreset("smollm2-2l", SMOLLM2, "smollm2-draft-2l", "a real 135M chat model, a two-layer draft that ships"),
        PairPreset("smollm2-4l", SMOLLM2, "smollm2-draft-4l", "the same model; four layers: better guesses, dearer"),
        PairPreset("smollm2-eagle", SMOLLM2, "smollm2-eagle", "the same model; a head that reads its states, ships"),
        PairPreset("smollm2-ngram", SMOLLM2, NGRAM, "a real 135M chat model, an n-gram table as draft"),
        PairPreset("smollm2-lookup", SMOLLM2, PROMPT_LOOKUP, "a real 135M chat model, drafts copied"),
        PairPreset(
            "tiny-10m-mixed",
            "tiny-10m",
            f"tiny-10m-draft-1l,tiny-10m-draft-2l,{NGRAM},{PROMPT_LOOKUP},{SUFFIX}",
            "shipped; two models, a table and copying, chosen round by round",
        ),
        PairPreset(
            "tiny-3m-mixed",
            "tiny-3m",
            f"tiny-3m-draft-1l,{NGRAM},{PROMPT_LOOKUP},{SUFFIX}",
            "shipped; the smallest target, drafts chosen round by round",
        ),
        PairPreset(
            "smollm2-mixed",
            SMOLLM2,
            f"smollm2-draft-2l,smollm2-draft-4l,{NGRAM},{PROMPT_LOOKUP},{SUFFIX}",
            "a real 135M chat model, drafts chosen round by round",
        ),
        PairPreset(
            "translator",
            "tiny-translator",
            "tiny-translator-draft-1l",
            "shipped; English to German: a target with an encoder, which its draft shares",
        ),
        PairPreset("translator-lookup", "tiny-translator", PROMPT_LOOKUP, "shipped; the same target, drafts copied"),
        PairPreset("tiny-10m", "tiny-10m", None, "shipped; no draft: for decoders that need none"),
        PairPreset("tiny-3m", "tiny-3m", None, "shipped; the smallest target, no draft"),
        PairPreset("smollm2", SMOLLM2, None, "a real 135M chat model, no draft"),
        PairPreset("opt-6.7b+opt-1.3b", "facebook/opt-6.7b", "facebook/opt-1.3b", "hub; 5:1, an accurate draft"),
        PairPreset("opt-6.7b+opt-125m", "facebook/opt-6.7b", "facebook/opt-125m", "hub; 54:1, a cheap draft"),
        PairPreset(
            "llama-3.1-70b+8b", _LLAMA.format("70B"), _LLAMA.format("8B"), "hub, gated; about 160 GB in bfloat16"
        ),
    )
}


def resolve(name: str) -> PairPreset:
    """The pair that a name stands for.

    Args:
        name: a preset, or ``target+draft`` where each side is what `load_model` takes and the draft may also be
            ``ngram``, ``prompt-lookup`` or ``suffix``: ``gpt2-xl+gpt2``, ``runs/mine+ngram``. Several drafts have
            commas between them: ``gpt2-xl+gpt2,prompt-lookup``. A target alone, for decoders that need no draft, is a
            folder or ``owner/model``. A draft model ending in ``:int8`` is quantised when it is loaded:
            ``gpt2-xl+gpt2:int8``; with ``:drafted-by-ngram``, ``:drafted-by-prompt-lookup`` or ``:drafted-by-suffix``
            after it, it is drafted for itself: ``gpt2-xl+gpt2:drafted-by-suffix``. ``early-exit:6`` is the first six
            layers of the target. Whether the models exist is seen when they are loaded.

    Raises:
        UnknownPairError: the name is none of these; the message lists the presets, the closest first.
    """
    if name in PRESETS:
        return PRESETS[name]
    # A folder's name may itself contain a plus, so every plus is tried as the one in the middle.
    for plus in (match.start() for match in re.finditer(r"\+", name)):
        target, draft = name[:plus], name[plus + 1 :]
        named = _may_be_draft(draft) or ("," in draft and all(map(_may_be_draft, draft.split(","))))
        if _may_be_model(target) and target not in _NO_MODELS and named:
            return PairPreset(name, target, draft, f"{target} with the draft {draft}")
    of_hub = "/" in name and name.partition("/")[0] not in PRESETS and _HUB_ID.fullmatch(name)
    if of_hub or _may_be_folder(name):
        return PairPreset(name, name, None, f"{name} without a draft")
    raise UnknownPairError(_unknown(name))


def head_folder(name: str | Path) -> Path | None:
    """The folder of an EAGLE head by a path, or by the name of one that ships; None where there is no head."""
    here = Path(name).expanduser() if path_exists(str(name)) else None
    shipped = _SHIPPED / name if re.fullmatch(r"[\w-]+", str(name)) else None
    for folder in (here, shipped):
        if folder is not None and ((folder / EAGLE).is_file() or public_head(folder) is not None):
            return folder
    return None


def public_head(folder: Path) -> dict[str, Any] | None:
    """Configuration of an EAGLE head in a public layout (`drafts/eagle/files.py`); None where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    kinds = f"{config.get('architectures')} {config.get('speculators_model_type')}".lower()
    return config if "eagle" in kinds else None


def _may_be_model(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) or path_exists(name)


def _may_be_draft(name: str) -> bool:
    model, mark, inner = name.partition(DRAFTED_BY)
    if mark and inner not in _NO_MODELS:
        return False
    if re.fullmatch(EARLY_EXIT + r"\d{1,6}", model):
        return True
    base = model.removesuffix(INT8)
    return _may_be_model(base) and (base == name or base not in _NO_MODELS)


def _may_be_folder(name: str) -> bool:
    return path_exists(name) and Path(name).expanduser().is_dir()


def path_exists(name: str) -> bool:
    """True if there is a file or folder of this name; an empty name would be the working directory."""
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # names that no file can have, or the home of an unknown user
        return False


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    table = "".join(f"\n  {preset.name:18} {preset.doc}" for preset in PRESETS.values())
    return (
        f"{name!r} is no known pair.{hint} Give target+draft (hub ids, folders or shipped models; the draft may be "
        f"{NGRAM!r}, {PROMPT_LOOKUP!r} or {SUFFIX!r}, or several with commas between them), a target alone (a folder "
        f"or owner/model), or one of:{table}"
    )


class PlacementError(SpecgymError, ValueError):
    """A type or a device that models cannot have on this machine; the message says which there are."""


def check_placement(dtype: str | None, device: str | None) -> None:
    """Raise PlacementError unless a type and a device are known by name; whether the device is there is not asked.

    Args:
        dtype: one of `DTYPES`; None for the default, float32 on a CPU and bfloat16 elsewhere.
        device: `cpu`, `cuda`, `cuda:1` and the like, `auto` to spread a model over all cards; None for the default,
            CUDA if there is any.
    """
    if dtype not in (None, *DTYPES):
        raise PlacementError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device is not None and not _DEVICE.fullmatch(device):
        raise PlacementError(f"device must be cpu, cuda, cuda:<number> or auto, got {device!r}")


def default_placement() -> tuple[str | None, str | None]:
    """The type and the device that models get here where a caller names none; None for that of the machine."""
    dtype, device = (os.environ.get(name) or None for name in _VARIABLES)
    return dtype, device


def place_models(dtype: str | None, device: str | None) -> None:
    """Make a type and a device the default of this process and of those that it starts from now on.

    Raises:
        PlacementError: one is unknown, or this machine has no such device.
    """
    check_placement(dtype, device)
    _require_device(device)
    _set(dtype, device)


@contextmanager
def models_placed(dtype: str | None, device: str | None) -> Iterator[None]:
    """Do `place_models`, and restore what was the default before. Errors as there."""
    before = default_placement()
    place_models(dtype, device)
    try:
        yield
    finally:
        _set(*before)


def _set(dtype: str | None, device: str | None) -> None:
    for name, value in zip(_VARIABLES, (dtype, device), strict=True):
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _require_device(device: str | None) -> None:
    if device in (None, "cpu", "auto"):
        return
    import torch

    assert device is not None
    kind, _, number = device.partition(":")
    module = getattr(torch, kind)
    count = module.device_count() if module.is_available() else 0
    if int(number or 0) >= count:
        there = ", ".join(["cpu", *(f"{kind}:{place}" for place in range(count))])
        raise PlacementError(
            f"this machine, or this build of torch, has no device {device!r}; there are: {there}. Name one of them, or "
            "leave the device out"
        )
