"""Snippets of the README, run as they are printed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.helpers.warm_python import ROOT, WarmPython

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}  # also where the package is not installed


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


SNIPPETS = snippets(ROOT / "README.md")


def runs_alone(snippet: str) -> bool:
    # Those need a model hub, or files of an engine; the tests of loading and of adaptors stand in for them.
    return not any(outside in snippet for outside in ("facebook/", ".gguf"))


@pytest.mark.parametrize("number", [number for number, snippet in enumerate(SNIPPETS) if runs_alone(snippet)])
def test_a_snippet_of_the_readme_runs_and_prints(number: int, tmp_path: Path, warm_python: WarmPython) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number], encoding="utf-8")
    done = warm_python.run(script, environment=ENVIRONMENT)
    assert done.returncode == 0, done.output
    assert len(done.output.splitlines()) > 2


DOCUMENTED = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.stem != "rl-libraries"  # whose snippets need libraries that are not installed here: test_rl_libraries.py
    for number, snippet in enumerate(snippets(page))
    if runs_alone(snippet)
]


@pytest.mark.parametrize("snippet", DOCUMENTED)
def test_a_snippet_of_the_docs_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(snippet, {"__name__": "snippet"})  # in a process of its own most of the time would go into imports


def test_the_readme_shows_an_environment_and_a_decoder() -> None:
    alone = [snippet for snippet in SNIPPETS if runs_alone(snippet)]
    assert any("gymnasium.make" in snippet for snippet in alone)
    assert any("SpeculativeDecoder(" in snippet for snippet in alone)
