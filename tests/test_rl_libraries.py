"""Snippets of the page on other RL libraries, run as they are printed, where their library is installed.

`pytest -m rl_libraries tests/test_rl_libraries.py` runs them, each in a process of its own; a plain `pytest` does not.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

import specgym

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/rl-libraries.md").read_text(encoding="utf-8")
MODULES = {
    "sb3-contrib": "sb3_contrib",
    "sbx": "sbx",
    "tianshou": "tianshou",
    "torchrl": "torchrl",
    "skrl": "skrl",
    "pufferlib-core": "pufferlib",
    "RLlib": "ray",
}
"""Modules that tell whether a library is installed, by its heading on the page."""


def snippet(library: str) -> str:
    section = PAGE.split(f"\n## {library}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return str(code)


@pytest.mark.parametrize("library", MODULES)
def test_every_library_of_the_table_has_a_snippet_about_an_environment_that_there_is(library: str) -> None:
    (row,) = re.findall(rf"^\| \[{library}\]\(#{library.lower()}\) .*$", PAGE, flags=re.MULTILINE)
    assert len(row.strip("|").split("|")) == 4
    strings = {node.value for node in ast.walk(ast.parse(snippet(library))) if isinstance(node, ast.Constant)}
    ids = [name for name in strings if isinstance(name, str) and name.startswith(f"{specgym.__name__}:")]
    assert ids
    for name in ids:
        assert name.removeprefix("specgym:") in gymnasium.registry


@pytest.mark.rl_libraries
@pytest.mark.parametrize("library", MODULES)
def test_a_library_learns_for_a_few_hundred_steps(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(MODULES[library]) is None:
        pytest.skip(f"{library} is not installed")
    script = tmp_path / "snippet.py"
    script.write_text(snippet(library), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
