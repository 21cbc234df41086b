"""What the commands have in common that train Medusa heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .loop import LoopSettings
from .own_text_settings import OwnTextSettings, check_least, check_optimiser


@dataclass(kw_only=True)
class HeadsSettings(OwnTextSettings):
    """Settings of the medusa and the medusa-joint command."""

    tree_size: int = 16
    """Candidates a round in the report."""
    report_prompts: int = 24
    """Prompts that the report's speed is measured on, over all domains."""
    report_tokens: int = 64
    """Tokens generated after each of them."""


_LEAST = {"tree_size": 1, "report_prompts": 1, "report_tokens": 1}


def check_heads_settings(settings: HeadsSettings, loop: LoopSettings, least: Mapping[str, int]) -> None:
    """Refuse settings that are out of range, before anything is loaded.

    Args:
        settings: to be checked.
        loop: how to train.
        least: the least values of further settings, by name.

    Raises:
        FitError: one is less than it must be, or the optimiser is not the heads'.
    """
    check_least(settings, {**least, **_LEAST})
    check_optimiser(loop, "heads are")
