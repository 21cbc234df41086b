"""The report's page and the files beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgym.agents.evaluation.heat_map import HeatMap
from specgym.agents.evaluation.results import ResultTable, Row
from specgym.agents.report.content import Report
from specgym.agents.report.figures import heat_figures, regret_figure
from specgym.agents.report.page import rendered, write_report

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}
ODD = 'a<b>&"c$/d'


class Page(HTMLParser):
    """The elements of a page; fails where they are not nested well."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def has(self, words: str) -> bool:
        return " ".join(words.split()) in " ".join("".join(self.text).replace("\N{NO-BREAK SPACE}", " ").split())

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.attributes if attribute in attributes]


@pytest.fixture
def bare_report() -> Report:
    return Report(
        title="Nothing yet", command="python evaluate.py runs/x --report", created="2026-01-01", summary=["Nothing."],
        settings={"seed": 0}, versions={"specgym": "1"},
        missing={name: f"make {name}" for name in ("table", "heat_maps", "curves", "transfer", "patterns", "hardware")},
    )  # fmt: skip


@pytest.fixture
def full_report(bare_report: Report, make_transfer: Callable[..., dict[str, Any]]) -> Report:
    values = {"ms_per_token": 4.0, "speedup": 1.25, "divergence": 0.125, "reward": 1.5}
    rows = [
        Row(ODD, method, {"fallback": 0.5}, values | {"reward": reward}, {"reward": (reward - 0.25, reward + 0.25)})
        for method, reward in (("default", 1.5), ("learned", 1.75))
    ]
    reward = np.arange(12.0).reshape(3, 4)
    reward[0, 0] = np.nan
    start, end, recommended, best = (
        {"fallback": x, "rollback": y} for x, y in ((0.5, 16), (0.75, 9), (0.8, 8), (0.8, 16))
    )
    axes = {"fallback": np.array([0.2, 0.5, 0.8]), "rollback": np.array([1.0, 4, 8, 16])}
    heat_map = HeatMap(ODD, axes, reward, [start, end], start, recommended, best)
    table = ResultTable(rows, hardware={"name": "an imaginary processor"})
    steps = np.array([10.0, 20, 30])
    curves = {
        "reward/total": (steps, np.array([1.0, 2.0, 2.5])),
        f"workload/{ODD}/reward/total": (steps, np.array([0.0, 1.0, 1.5])),
        "workload/other/reward/total": (steps[:2], np.array([2.0, 3.0])),
    }
    return replace(
        bare_report, title=f"About {ODD}", table=table, heat_maps=[heat_map], curves=curves,
        transfer=make_transfer(ODD),
        patterns=[{"workload": ODD, "inside": True, "loss": {"reward": 0.25}}], pattern_verdict="They lie low.",
        settings={"learning": {"rate": 0.001}, "workloads": [ODD]},
        missing={}, recommended={"pairs": {ODD: {"fallback": 0.4}}, "workloads": {}},
        made_by={"the run": f"python train.py --workloads '{ODD}'"},
    )  # fmt: skip


def test_the_page_holds_every_section_in_words_and_figures(full_report: Report) -> None:
    page = Page(rendered(full_report))
    for words in (
        "Nothing.",
        "1.750",
        "1.500 to 2.000",
        "grid's best (0.8, 16)",
        "Leaving one pair of models out",
        "against",
        "They lie low.",
        "learning.rate",
        "an imaginary processor",
        "loss: reward",
        "python evaluate.py runs/x --report",
    ):
        assert page.has(words), words
    labels = [attributes["aria-label"] or "" for tag, attributes in page.attributes if tag == "svg"]
    for begin in ("Legend", "Reward at", "Reward by environment steps", "Regret of every method"):
        assert any(label.startswith(begin) for label in labels), begin
    assert not page.has("This run has no")


def test_the_page_has_the_verdict_line_by_line_and_the_notes_below_the_table(full_report: Report) -> None:
    verdict = "a/prose: learned thresholds, 1.61 x plain\nTo be preferred overall: learned thresholds."
    table = replace(full_report.table, verdict=verdict, notes=("Target and draft take 1.2 GiB.",))
    page = Page(rendered(replace(full_report, table=table)))
    assert all(page.has(words) for words in (*verdict.splitlines(), *table.notes))
    assert not Page(rendered(replace(full_report, table=replace(table, verdict="In one line.")))).has("In one line.")


def test_a_page_without_results_says_what_is_missing_and_how_to_make_it(bare_report: Report) -> None:
    page = Page(rendered(bare_report))
    for section, how in bare_report.missing.items():
        assert page.has(how), section
    assert page.has("This run has no heat maps. Make them with: make heat_maps")


def test_the_page_loads_nothing_and_runs_nothing(full_report: Report) -> None:
    page = Page(rendered(full_report))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.attributes}
    for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
        for value in page.values(name):
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "@import" not in "".join(page.text)
    assert "url(http" not in rendered(full_report)


def test_references_within_figures_meet_one_element_each(full_report: Report) -> None:
    text = rendered(full_report)
    page = Page(text)
    names = page.values("id")
    assert len(names) == len(set(names))
    referred = {value[1:] for name in ("href", "xlink:href") for value in page.values(name) if value.startswith("#")}
    clips = {value[5:-1] for value in page.values("clip-path")}
    assert clips
    assert referred | clips <= set(names)


def test_names_from_files_are_shown_as_they_are(full_report: Report) -> None:
    text = rendered(full_report)
    assert Page(text).has(f"About {ODD}")
    assert ODD not in text
    assert "<b>&" not in text


def test_csv_and_json_hold_the_same_unrounded_tables(full_report: Report, tmp_path: Path) -> None:
    write_report(full_report, tmp_path)
    stored = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["tables"]
    assert stored == {name: rows for name, rows in full_report.flat_tables().items() if rows}
    assert {path.stem for path in (tmp_path / "report").glob("*.csv")} == set(stored)
    assert set(stored) >= {
        "table",
        "heat_maps",
        "policy_paths",
        "curves",
        "transfer_summary",
        "transfer_tests",
        "patterns",
    }
    for name, rows in stored.items():
        with (tmp_path / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            read = list(csv.DictReader(file))
        assert len(read) == len(rows)
        for row, texts in zip(rows, read, strict=True):
            for column, text in texts.items():
                value = row.get(column)
                assert text == ("" if value is None else str(value))
    assert stored["table"][1]["reward_low"] == 1.5
    assert [row["reward"] for row in stored["heat_maps"]] == [None, *range(1, 12)]


def test_a_new_report_replaces_the_old_one_whole(
    full_report: Report, bare_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_report(full_report, tmp_path)
    before = page.read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="full"):
            write_report(replace(full_report, title="Other"), tmp_path)
    assert page.read_text(encoding="utf-8") == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert write_report(bare_report, tmp_path) == page
    assert "Nothing yet" in page.read_text(encoding="utf-8")
    assert not list((tmp_path / "report").glob("*.csv"))


def test_two_writings_of_one_report_are_equal(full_report: Report) -> None:
    assert rendered(full_report) == rendered(full_report)


def test_regret_is_drawn_where_a_method_beats_the_grid(make_transfer: Callable[..., dict[str, Any]]) -> None:
    summary = make_transfer("x")["summary"]
    drawing = regret_figure([row | {"fraction": 1.01, "high": 1.02} for row in summary], "regret-0")
    assert "learned -1 % to -1 %" in drawing
    Page(drawing)


def test_a_heat_map_whose_shapes_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 2\)"):
        HeatMap("x", {"a": np.array([1.0, 2, 3]), "b": np.array([1.0, 2])}, np.ones((2, 2)), [], {}, None, {})


@pytest.mark.parametrize(("knobs", "figures"), [(1, 1), (2, 1), (3, 3), (4, 6)])
def test_one_knob_is_drawn_as_a_curve_two_as_a_map_and_more_as_maps_of_pairs(knobs: int, figures: int) -> None:
    axes = {name: np.arange(1.0, 4.0) for name in "abcd"[:knobs]}
    reward = np.random.default_rng(0).random((3,) * knobs)
    places = [dict.fromkeys(axes, value) for value in (1.0, 2.0, 3.0)]
    drawn = HeatMap("x", axes, reward, places, places[0], places[1], places[2])
    svgs = heat_figures(drawn, "heat-0")
    assert len(svgs) == figures
    for title, svg in svgs:
        Page(svg)
        assert title.startswith("x")
        assert ("pcolormesh" in svg or "image/png" in svg) == (knobs > 1)
    if knobs == 3:
        np.testing.assert_array_equal(drawn.over("a", "c"), reward.max(1))
        assert drawn.reward_at(places[1]) == reward[1, 1, 1]
