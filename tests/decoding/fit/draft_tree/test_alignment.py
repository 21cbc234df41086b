"""The command that fits alignments, on a draft whose states are its target's in other coordinates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment
from specgym.decoding.decoders.draft_tree.files import load_alignment
from specgym.decoding.errors import FitError, TrainingError
from specgym.decoding.fit.__main__ import main
from specgym.decoding.fit.draft_tree import alignment as module
from specgym.decoding.fit.draft_tree.alignment import DRAFT, KEPT, LEAST_SQUARES, AlignmentSettings, make_alignment
from specgym.decoding.fit.settings import TextSettings
from specgym.decoding.fit.text import target_text
from specgym.decoding.loading.pair import load_pair
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.killed_runs import assert_resumed_as_if_never_killed


@pytest.fixture
def settings(pair_folder: Path, common: dict[str, Any]) -> AlignmentSettings:
    return AlignmentSettings(out=pair_folder / "draft-alignment", **common)


def models(settings: AlignmentSettings) -> tuple[LanguageModel, LanguageModel]:
    pair: Any = load_pair(f"{settings.target}+{settings.draft}", prepack=False)
    return pair.draft.model, pair.target


def test_least_squares_find_the_coordinates_and_agree_where_the_draft_itself_errs(settings: AlignmentSettings) -> None:
    report = make_alignment(replace(settings, gradient=False))
    assert report.agreements[DRAFT].match < 0.8
    assert report.agreements[KEPT].match > 0.98
    assert report.agreements[KEPT].match == report.agreements[LEAST_SQUARES].match
    assert report.r_squared[KEPT] > 0.98
    card = (settings.out / "README.md").read_text()
    assert "least squares in closed form, on a CPU" in card
    assert "KL divergence from target" not in card


def test_training_brings_a_map_that_begins_as_none_to_the_targets_distribution(settings: AlignmentSettings) -> None:
    """With a penalty that leaves nothing of least squares, all that is learnt is learnt by gradient."""
    loop = replace(settings.loop, tokens=300 * 32, learning_rate=2e-2)
    report = make_alignment(replace(settings, penalty=1e9, loop=loop))
    assert report.agreements[LEAST_SQUARES].match < 0.5
    assert report.agreements[KEPT].match > 0.95
    assert report.agreements[KEPT].divergence < report.agreements[DRAFT].divergence / 4


def test_training_begins_with_no_map_where_that_diverges_less(
    settings: AlignmentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that is the target needs none, and a heavy penalty takes from least squares what they knew."""
    started = list[torch.Tensor]()

    def no_training(alignment: AffineAlignment, *_: Any) -> tuple[None, None]:
        started.append(alignment.weight.detach().clone())
        return None, None

    monkeypatch.setattr(module, "train_beside", no_training)
    make_alignment(replace(settings, draft=settings.target, penalty=10.0))
    make_alignment(settings)
    assert torch.equal(started[0], torch.eye(64))
    assert not torch.equal(started[1], torch.eye(64))


def test_the_written_alignment_is_found_by_the_drafts_name_and_is_the_one_reported(
    settings: AlignmentSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fit", "alignment", "--target", settings.target, "--draft", settings.draft])
    report = make_alignment(settings)
    loaded = load_alignment(settings.out, *models(settings))
    assert loaded.weight.shape == (64, 64)
    card = (settings.out / "README.md").read_text()
    assert "python -m specgym.decoding.fit alignment --target target --draft draft" in card
    assert f"| this alignment | {report.r_squared[KEPT]:.3f} | {100 * report.agreements[KEPT].match:.1f} |" in card
    assert "target itself continued 80 prompts of 3 to 6 tokens" in card
    assert "| notes |" in card
    assert "still going on" not in card
    assert str(tmp_path) not in card + (settings.out / "alignment.json").read_text()


def test_a_killed_run_resumes_to_the_identical_result_with_the_text_and_states_that_it_had(
    settings: AlignmentSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = replace(settings, penalty=10.0)  # so that there is something left to learn
    assert_resumed_as_if_never_killed(
        make_alignment, poor, module, "save_alignment", "alignment.safetensors", tmp_path, monkeypatch
    )


def test_a_state_of_other_settings_is_refused(settings: AlignmentSettings) -> None:
    short = replace(settings, loop=replace(settings.loop, tokens=32))
    make_alignment(short)
    with pytest.raises(TrainingError, match=r"draft-alignment\.pt belongs to a run with other settings or text"):
        make_alignment(replace(short, penalty=100.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"penalty": -1.0}, "--penalty must be a finite number of at least 0, got -1.0"),
        ({"check_steps": 0}, "--check-steps must be a whole number of at least 1, got 0"),
        ({"loop": {"optimiser": "muon"}}, "AdamW without weight decay"),
        ({"loop": {"batch": 100}}, "tokens of the target's own text are too few for a batch of 1600"),
        (
            {"own_text": TextSettings(texts=80, prompt_tokens=1)},
            "--prompt-tokens must be a whole number of at least 2, got 1",
        ),
        ({"own_text": TextSettings(texts=80, new_tokens=70)}, "are together more than the model's context of 64"),
        ({"draft": "prompt-lookup"}, "--draft prompt-lookup is no model, so it has no hidden states"),
        ({"draft": "tiny-10m"}, "--draft tiny-10m lacks tokens of --target .* or numbers them otherwise"),
        ({"text": (Path("nowhere.txt"),)}, "no text in nowhere.txt"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_generated(
    settings: AlignmentSettings, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(target_text, "continue_rows", lambda *_: pytest.fail("text was generated"))
    if isinstance(changed.get("loop"), dict):
        changed = {"loop": replace(settings.loop, **changed["loop"])}
    with pytest.raises((FitError, FileNotFoundError), match=message):
        make_alignment(replace(settings, **changed))
    assert not settings.out.exists()


def test_neither_models_folder_is_written_over(settings: AlignmentSettings) -> None:
    for name in (settings.target, settings.draft):
        with pytest.raises(FitError, match=r"would be written over .*, which is read: give another --out"):
            make_alignment(replace(settings, out=Path(name)))


def test_the_command_line_fits_an_alignment(settings: AlignmentSettings, pair_folder: Path) -> None:
    options = "--texts 20 --prompt-tokens 4 --new-tokens 8 --tokens 16 --batch 1 --length 8 --device cpu --penalty 0.1"
    places = ["--out", str(settings.out), "--text", str(pair_folder / "notes.txt"), "--work", str(pair_folder / "work")]
    main(["alignment", "--target", settings.target, "--draft", settings.draft, *places, *options.split()])
    load_alignment(settings.out, *models(settings))
