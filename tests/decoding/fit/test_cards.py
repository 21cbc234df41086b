"""The cards of what ships say how it was made."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import tyro

from specgym.decoding import fit
from specgym.decoding.fit.__main__ import Command

CARDS = sorted((Path(fit.__file__).parent.parent / "data" / "models").glob("*/README.md"))
MADE_BY = "python -m specgym.decoding.fit "


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_command_on_a_card_is_one_that_is_understood(card: Path) -> None:
    (line,) = [line for line in card.read_text().splitlines() if line.startswith(MADE_BY)]
    made = tyro.cli(Command, args=shlex.split(line.removeprefix(MADE_BY)))
    assert made.out.name == card.parent.name  # type: ignore[union-attr]
