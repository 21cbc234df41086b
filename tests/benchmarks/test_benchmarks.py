"""Smoke tests: every benchmark explains its options, and the smallest runs of most of them come to their end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import benchmarks

SHARED = {"compare_decoders", "knob_grids", "rivals"}
NAMES = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("*.py") if path.stem not in SHARED)
COMPARISON = "--targets tiny-3m --prompts 1 --tokens 6"
SMALLEST = {
    "against_rivals": "--pairs tiny-3m-1l --rivals assisted lookup --temperatures 0 --threads 1 --prompt-sets prose "
    "--prompts 1 --tokens 2",
    "cheaper_drafts": "--target tiny-translator --drafts tiny-translator-draft-1l --lengths 2 --fallbacks 0 1 "
    "--prompt-sets interface --prompts 2 --tokens 4",
    "draft_tree": f"{COMPARISON} --prompt-sets prose --thresholds 0.1",
    "forward_cost": "--model tiny-3m --tokens 1 2 --cached 8 --repeats 1",
    "lookahead": f"{COMPARISON} --prompt-sets repetitive --knobs 5 3 5 --unseeded 5 3 5",
    "lookahead_pool": f"{COMPARISON} --prompt-sets prose --presets small",
    "medusa": f"{COMPARISON} --prompt-sets prose --heads 1 --candidates 4",
    "roofline_against_published": "",
    "replay_agreement": "--workloads tiny-3m-lookup/prose --prompts 1 --tokens 4 --replays 1",
}
"""Arguments of runs of a few seconds."""


def run(name: str, arguments: str, patch: pytest.MonkeyPatch) -> None:
    """Call the benchmark as its command does, in this process."""
    patch.setattr(sys, "argv", [f"benchmarks/{name}.py", *arguments.split()])
    importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_explains_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help", monkeypatch)
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_run_comes_to_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    run(name, f"{SMALLEST[name]} --json {figures}", monkeypatch)
    assert json.loads(figures.read_text(encoding="utf-8"))
    assert "─" in (shown := capsys.readouterr().out) or "|" in shown  # a table
