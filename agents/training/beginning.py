"""How a run begins, whatever it learns: its name, its folder, and the command that asked for it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .settings_checks import SettingsError
from .settings_io import StoredSettings

_T = TypeVar("_T", bound=StoredSettings)


def this_command() -> str:
    """The command line that runs, as a user would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def begin(settings: _T, kind: str, check: Callable[[_T], object]) -> _T:
    """Make the folder of a new run, with its settings in it.

    Args:
        settings: of the run; without a name they get one from the date and time.
        kind: what such a name begins with.
        check: raises where the settings ask for what is not there; called before there is a folder.

    Returns:
        The settings, with a name.

    Raises:
        SettingsError: the folder is taken.
    """
    if not settings.name:
        unnamed: Any = settings
        settings = replace(unnamed, name=time.strftime(f"{kind}-%Y%m%d-%H%M%S"))
    folder, stored = settings.folder, settings.folder / "settings.json"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        way_out = f"go on with --resume {folder}" if stored.is_file() else "remove it"
        raise SettingsError(f"{folder} exists already; {way_out}, or choose another --name")
    check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(stored, this_command())
    return settings
