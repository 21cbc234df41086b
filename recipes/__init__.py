"""Make the toy models, prompt sets and corpus that the package ships; run in a checkout, not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from specgym.decoding.errors import run_command

SettingsT = TypeVar("SettingsT")


def run(name: str, settings: type[SettingsT], make: Callable[[SettingsT], object]) -> None:
    """Run a recipe from the command line; expected errors are shown without a traceback.

    Args:
        name: name of its module.
        settings: options, with their help.
        make: the recipe.
    """
    sys.exit(run_command(lambda: make(tyro.cli(settings, prog=f"python -m recipes.{name}"))))
