"""The recipe of the shipped tuner: its card, its files, and the tables of the page."""

from __future__ import annotations

import pytest

from recipes.tuner import PAGE, between
from specgym.agents import SHIPPED_TUNER


def test_what_stands_between_two_marks_is_replaced() -> None:
    page = "a\n<!-- live -->\nold\n\nold too\n<!-- /live -->\nb\n"
    assert between(page, "live", r"| \1 |") == "a\n<!-- live -->\n| \\1 |\n<!-- /live -->\nb\n"


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="must have <!-- worlds --> and <!-- /worlds --> once, found them 0 times"):
        between("nothing", "worlds", "new")


def test_card_and_page_show_the_same_tables() -> None:
    card, page = (SHIPPED_TUNER / "README.md").read_text(), PAGE.read_text()
    shown = page.split("<!-- worlds -->\n")[1].split("\n\nAfter")[0]
    assert "| learned |" in shown
    assert shown in card
    assert "python train.py --env specgym/SpeculativeWorlds-v0" in card
