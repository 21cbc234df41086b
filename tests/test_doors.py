"""Modules that a process loads: costs of deployments need no models, and a help text no figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADED = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"


def loaded_by(script: str) -> set[str]:
    """Top-level modules of a fresh process after a script."""
    command = [sys.executable, "-c", f"import atexit\natexit.register(lambda: exec({LOADED!r}))\n{script}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ended.stderr.splitlines()[-1].split())


def test_costs_of_deployments_load_no_model_library() -> None:
    loaded = loaded_by(
        "from specgym.decoding import HARDWARE, MODEL_SHAPES, Deployment, round_costs\n"
        "round_costs(Deployment(MODEL_SHAPES['qwen3-8b'], MODEL_SHAPES['qwen3-0.6b'], HARDWARE['l4']), [1, 8], 4)"
    )
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers"}


def test_the_help_of_training_loads_no_figures() -> None:
    loaded = loaded_by(
        "import sys, runpy\nsys.argv = ['train.py', '--help']\nrunpy.run_path('train.py', run_name='__main__')"
    )
    assert "tyro" in loaded
    assert not loaded & {"matplotlib", "jinja2"}


def test_the_doors_are_lazy() -> None:
    loaded = loaded_by("import specgym.decoding, specgym.envs, specgym.agents, specgym.callbacks")
    assert not loaded & {"torch", "transformers", "stable_baselines3", "matplotlib", "tyro"}
