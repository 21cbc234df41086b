"""The cards of what ships say how it was made."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

from recipes.target import TargetSettings
from recipes.translator import TranslatorSettings
from specgym.decoding import fit
from specgym.decoding.fit.__main__ import Command

CARDS = sorted((Path(fit.__file__).parent.parent / "data" / "models").glob("*/README.md"))
PROGRAMS: dict[str, Any] = {
    "python -m specgym.decoding.fit ": Command,
    "python -m recipes.target ": TargetSettings,
    "python -m recipes.translator ": TranslatorSettings,
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_command_on_a_card_is_one_that_is_understood(card: Path) -> None:
    lines = card.read_text().splitlines()
    ((program, line),) = [(start, line) for line in lines for start in PROGRAMS if line.startswith(start)]
    settings = tyro.cli(PROGRAMS[program], args=shlex.split(line.removeprefix(program)))
    assert settings.out.name == card.parent.name
