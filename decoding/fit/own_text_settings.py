"""What the commands have in common that learn from text which a target writes itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from .distilled_text import TextSettings
from .draft import place_of
from .errors import FitError
from .loop import LoopSettings, device_of


@dataclass(kw_only=True)
class OwnTextSettings:
    """Settings of every command that learns from a target's own text."""

    target: str
    """The target: a folder, a hub id, or a model that the package ships."""
    text: tuple[Path, ...] = ()
    """Text files and folders to cut prompts from, each a domain of its own; without any, the corpus is used."""
    corpus: Path = Path("runs/corpus")
    """Folder written by the corpus command."""
    own_text: tyro.conf.OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    """How the target's own text is made; what another command made with the same settings and the same
    --dtype is used again."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the models' weights; by default bfloat16 on CUDA where they stay as they are, and float32 elsewhere. What is
    trained beside them is always float32."""
    check_steps: int = 50
    """Steps between two checks of the loss on text that was kept apart."""
    patience: int = 8
    """Checks without progress after which training ends; 0 trains to the end. The best weights are kept either way."""
    licence: str = "other"
    """Licence of the weights, for the card."""


def check_least(settings: OwnTextSettings, least: Mapping[str, int]) -> None:
    """Refuse settings that are out of range, before anything is loaded.

    Args:
        settings: to be checked.
        least: the least values of the command's own settings, by name.

    Raises:
        FitError: one is less than it must be.
    """
    for name, low in {**least, "check_steps": 1, "patience": 0}.items():
        if getattr(settings, name) < low:
            raise FitError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(settings, name)}")


def check_optimiser(loop: LoopSettings, what: str) -> None:
    """Refuse an optimiser that small networks beside a model are not trained by.

    Raises:
        FitError: it is another than AdamW without weight decay.
    """
    if loop.optimiser != "adamw" or loop.weight_decay:
        raise FitError(f"{what} trained by AdamW without weight decay: leave out --optimiser and --weight-decay")


def check_folders(target: str, out: Path, *read: str | Path) -> None:
    """Refuse to write where something is read from.

    Args:
        target: its name, or its folder.
        out: folder to be written.
        read: further folders that are read.

    Raises:
        FitError: ``out`` is one of them.
    """
    for name, folder in ((target, place_of(target)), *((str(folder), Path(folder)) for folder in read)):
        if folder is not None and folder.expanduser().resolve() == out.expanduser().resolve():
            raise FitError(f"{out} would be written over {name}, which is read: give another --out")


def dtype_of(settings: OwnTextSettings, loop: LoopSettings, frozen: bool) -> torch.dtype:
    """Of the models' weights.

    Args:
        settings: may say which.
        loop: says where to train.
        frozen: the target stays as it is.
    """
    if settings.dtype is not None:
        return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if frozen and device_of(loop).type == "cuda" else torch.float32
