"""A target that counts, a draft that sees the same in other coordinates, and text to begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from specgym.decoding.fit.settings import LoopSettings, TextSettings
from tests.helpers.counting import counting_model, words
from tests.helpers.rotated_draft import rotated_draft


@pytest.fixture
def pair_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with ``target``, ``draft`` and ``notes.txt``."""
    for name, model in (("target", counting_model(len(tokenizer))), ("draft", rotated_draft(len(tokenizer)))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "notes.txt").write_text(words(9000))
    return tmp_path


@pytest.fixture
def common(pair_folder: Path) -> dict[str, Any]:
    """Settings that both commands have."""
    return {
        "target": str(pair_folder / "target"),
        "draft": str(pair_folder / "draft"),
        "text": (pair_folder / "notes.txt",),
        "own_text": TextSettings(texts=80, prompt_tokens=6, new_tokens=16, generate_batch=80),
        "check_steps": 20,
        "patience": 0,
        "loop": LoopSettings(
            tokens=60 * 32, batch=2, length=16, learning_rate=5e-3, optimiser="adamw", weight_decay=0.0,
            bfloat16=False, device="cpu", work=pair_folder / "work",
        ),
    }  # fmt: skip
