"""The command that trains acceptance predictors, on a target that counts and a draft that sometimes miscounts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from specgym.decoding import DraftTreeDecoder
from specgym.decoding.decoders.draft_tree.alignment import DraftTreeModelError
from specgym.decoding.decoders.draft_tree.files import load_acceptance, load_alignment
from specgym.decoding.errors import FitError, TrainingError
from specgym.decoding.fit.__main__ import main
from specgym.decoding.fit.draft_tree import acceptance as module
from specgym.decoding.fit.draft_tree.acceptance import (
    CALIBRATED,
    RAW,
    SCALED,
    SHARPENED,
    AcceptanceSettings,
    make_acceptance,
)
from specgym.decoding.fit.draft_tree.alignment import AlignmentSettings, make_alignment
from specgym.decoding.fit.text import target_text
from specgym.decoding.loading.pair import load_pair
from tests.helpers.counting import counting_model
from tests.helpers.killed_runs import assert_resumed_as_if_never_killed
from tests.helpers.rotated_draft import rotated_draft


@pytest.fixture
def settings(pair_folder: Path, common: dict[str, Any]) -> AcceptanceSettings:
    """With an alignment that the command finds by itself."""
    make_alignment(AlignmentSettings(out=pair_folder / "draft-alignment", gradient=False, **common))
    return AcceptanceSettings(out=pair_folder / "draft-acceptance", width=16, children=3, depth=3, **common)


def test_the_predictor_beats_everything_that_is_made_of_the_drafts_probabilities_alone(
    settings: AcceptanceSettings,
) -> None:
    report = make_acceptance(settings)
    best = min(report.scores[name].brier for name in (RAW, SCALED, SHARPENED))
    assert report.scores[CALIBRATED].brier < best / 2
    assert report.loss.improved
    assert sum(report.scores[CALIBRATED].counts) == report.candidates
    assert set(report.by_depth) == {1, 2, 3}
    assert set(report.by_rank) == {1, 2, 3}


@pytest.mark.parametrize("label", ["match", "probability", "ratio"])
@pytest.mark.parametrize("aligned_scores", [True, False])
def test_predictors_of_every_kind_are_written_as_they_say(
    settings: AcceptanceSettings, label: Any, aligned_scores: bool
) -> None:
    loop = replace(settings.loop, tokens=10 * 32)
    report = make_acceptance(replace(settings, label=label, aligned_scores=aligned_scores, loop=loop))
    pair: Any = load_pair(f"{settings.target}+{settings.draft}", prepack=False)
    models = pair.draft.model, pair.target
    alignment = load_alignment(Path(settings.draft).with_name("draft-alignment"), *models)
    network = load_acceptance(settings.out, *models, alignment)
    assert (network.shape.label, network.shape.aligned_scores, network.shape.deepest) == (
        label,
        aligned_scores,
        3,
    )
    assert float(network.temperature) == pytest.approx(report.temperature)
    assert f"label `{label}`" in (settings.out / "README.md").read_text()


@pytest.mark.parametrize("padding", [(0, 8), (8, 0)])
def test_target_and_draft_may_be_padded_to_other_sizes(
    pair_folder: Path, common: dict[str, Any], tokenizer: PreTrainedTokenizerBase, padding: tuple[int, int]
) -> None:
    ours, theirs = (len(tokenizer) + rows for rows in padding)
    counting_model(ours).save_pretrained(pair_folder / "target")
    rotated_draft(theirs).save_pretrained(pair_folder / "draft")
    common["loop"] = replace(common["loop"], tokens=10 * 32)
    make_alignment(AlignmentSettings(out=pair_folder / "draft-alignment", **common))
    report = make_acceptance(AcceptanceSettings(out=pair_folder / "draft-acceptance", label="ratio", **common))
    assert report.scores[CALIBRATED].brier < report.scores[RAW].brier
    decoder = DraftTreeDecoder.for_pair(load_pair(f"{common['target']}+{common['draft']}", prepack=False))
    assert decoder.guidance.predictor is not None
    assert decoder.generate([20], max_new_tokens=20).mean_acceptance_length > 1.5


def test_the_card_has_the_scores_the_confidence_analysis_and_the_plot(
    settings: AcceptanceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fit", "acceptance", "--target", settings.target, "--draft", settings.draft])
    report = make_acceptance(settings)
    card = (settings.out / "README.md").read_text()
    assert "python -m specgym.decoding.fit acceptance --target target --draft draft" in card
    assert f"| predictor, calibrated | {report.scores[CALIBRATED].brier:.4f} |" in card
    assert "| 0.0 to 0.1 |" in card
    assert "| at depth 3 |" in card
    assert "| of rank 1 |" in card
    assert "![Reliability](reliability.png)" in card
    assert (settings.out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in card + (settings.out / "acceptance.json").read_text()


def test_a_killed_run_resumes_to_the_identical_result_with_the_text_and_states_that_it_had(
    settings: AcceptanceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = assert_resumed_as_if_never_killed(
        make_acceptance, settings, module, "save_acceptance", "acceptance.safetensors", tmp_path, monkeypatch
    )
    with pytest.raises(TrainingError, match=r"made\.pt belongs to a run with other settings or text"):
        make_acceptance(replace(parts, label="ratio"))


def test_a_missing_alignment_is_named_with_the_command_that_fits_it(
    pair_folder: Path, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_text, "continue_rows", lambda *_: pytest.fail("text was generated"))
    alone = AcceptanceSettings(out=pair_folder / "draft-acceptance", **common)
    with pytest.raises(DraftTreeModelError, match=r"no alignment for .*draft, which .* fit one: .*fit alignment"):
        make_acceptance(alone)
    with pytest.raises(DraftTreeModelError, match="there is no alignment in nowhere"):
        make_acceptance(replace(alone, alignment="nowhere"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"children": 0}, "--children must be a whole number of at least 1, got 0"),
        ({"children": 1000}, r"--children 1000 is more than the \d+ tokens there are"),
        ({"depth": 0}, "--depth must be a whole number of at least 1"),
        ({"width": 0}, "--width must be a whole number of at least 1"),
        ({"label_temperature": 0.0}, "--label-temperature must be a finite number above 0, got 0.0"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_generated(
    pair_folder: Path, common: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        make_acceptance(AcceptanceSettings(out=pair_folder / "draft-acceptance", **{**common, **changed}))
    assert not (pair_folder / "work").exists()


def test_the_command_line_trains_a_predictor(settings: AcceptanceSettings, pair_folder: Path) -> None:
    options = "--texts 20 --prompt-tokens 4 --new-tokens 8 --tokens 16 --batch 1 --length 8 --device cpu --width 4"
    places = ["--out", str(settings.out), "--text", str(pair_folder / "notes.txt"), "--work", str(pair_folder / "work")]
    main(["acceptance", "--target", settings.target, "--draft", settings.draft, *places, *options.split()])
    assert {path.suffix for path in settings.out.iterdir()} == {".json", ".safetensors", ".md", ".png"}
