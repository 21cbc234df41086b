"""Recipes stay in the checkout: neither the wheel nor the package knows them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_setup_packages_no_recipes() -> None:
    script = (ROOT / "setup.py").read_text(encoding="utf-8")
    code = f"import setuptools\nsetuptools.setup = lambda **settings: print(*settings['packages'])\n{script}"
    packages = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert "specgym.decoding.fit.text" in packages
    assert not [name for name in packages if "recipes" in name]


def test_the_package_imports_no_recipes() -> None:
    for folder in ("specgym", "decoding", "envs", "agents", "callbacks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) recipes", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_scripts_name_modules_that_exist() -> None:
    for script in (ROOT / "recipes").glob("*.sh"):
        for module in re.findall(r"-m \"?([\w.]+)", script.read_text(encoding="utf-8")):
            place = ROOT / module.removeprefix("specgym.").rstrip(".").replace(".", "/")
            assert place.is_dir() or place.with_suffix(".py").is_file(), module
