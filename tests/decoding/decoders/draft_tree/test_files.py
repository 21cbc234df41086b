"""Alignments and predictors as files: what is written is read again, and what does not fit is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from specgym.decoding.decoders.draft_tree import files
from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment, DraftTreeModelError
from specgym.decoding.decoders.draft_tree.files import (
    load_acceptance,
    load_alignment,
    save_acceptance,
    save_alignment,
    usual_acceptance,
    usual_alignment,
)
from specgym.decoding.decoders.draft_tree.predictor import AcceptancePredictor, PredictorShape
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.sealing import reseal

MakeModel = Callable[..., LanguageModel]
KINDS = ("alignment", "acceptance")


@pytest.fixture(scope="module")
def make_named(make_model: Callable[..., PreTrainedModel]) -> MakeModel:
    """A model of some name; more as for `make_model`."""

    def make(name: str, **more: Any) -> LanguageModel:
        model = make_model("llama", **more)
        model.name_or_path = name
        return LanguageModel(model, prepack=False)

    return make


@pytest.fixture(scope="module")
def target(make_named: MakeModel) -> LanguageModel:
    return make_named("big")


@pytest.fixture(scope="module")
def draft(make_named: MakeModel) -> LanguageModel:
    return make_named("small", hidden=16, layers=1, seed=3)


def shaken(module: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter).half())  # what is stored without loss


def an_alignment(seed: int = 0) -> AffineAlignment:
    result = AffineAlignment(16, 32)
    shaken(result, seed)
    return result


def a_predictor() -> AcceptancePredictor:
    result = AcceptancePredictor(PredictorShape(32, label="probability", deepest=3, width=8, aligned_scores=False))
    shaken(result)
    result.temperature.fill_(1.25)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, draft: LanguageModel, target: LanguageModel) -> Path:
    """Folders of both, by the names in `KINDS`."""
    folder = tmp_path_factory.mktemp("saved")
    save_alignment(an_alignment(), folder / "alignment", draft, target, card="# An alignment\n")
    save_acceptance(a_predictor(), folder / "acceptance", draft, target, an_alignment())
    return folder


@pytest.fixture
def folders(saved: Path, tmp_path: Path) -> Path:
    """Copies of the folders, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "saved"))


def load(kind: str, folders: Path, draft: LanguageModel, target: LanguageModel) -> nn.Module:
    if kind == "alignment":
        return load_alignment(folders / kind, draft, target)
    return load_acceptance(folders / kind, draft, target, an_alignment())


def test_an_alignment_comes_back_as_it_was_saved(saved: Path, draft: LanguageModel, target: LanguageModel) -> None:
    back = load_alignment(saved / "alignment", draft, target)
    states = torch.randn(3, 16)
    assert torch.equal(back(states), an_alignment()(states))
    assert not back.training
    assert (saved / "alignment" / "README.md").read_text() == "# An alignment\n"
    assert {path.name for path in (saved / "acceptance").iterdir()} == {"acceptance.json", "acceptance.safetensors"}


def test_a_predictor_comes_back_with_its_temperature_and_label(
    saved: Path, draft: LanguageModel, target: LanguageModel
) -> None:
    back = load_acceptance(str(saved / "acceptance"), draft, target, an_alignment())
    assert back.shape == a_predictor().shape
    assert float(back.temperature) == 1.25
    for name, value in a_predictor().state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_another_draft_or_target_is_refused_by_name(
    saved: Path, draft: LanguageModel, target: LanguageModel, make_named: MakeModel, kind: str
) -> None:
    with pytest.raises(DraftTreeModelError, match="made for the draft small, and other is another model"):
        load(kind, saved, make_named("other", hidden=16, layers=1, seed=4), target)
    with pytest.raises(DraftTreeModelError, match="made for the target big, and other is another model"):
        load(kind, saved, draft, make_named("other", seed=5))
    with pytest.raises(DraftTreeModelError, match="made for the target big, and wide is another model"):
        load(kind, saved, draft, make_named("wide", hidden=64))
    with pytest.raises(DraftTreeModelError, match=f"fit {kind} --draft other --target big --out "):
        load(kind, saved, make_named("other", hidden=16, layers=1, seed=4), target)


def test_a_draft_of_another_width_is_refused(saved: Path, target: LanguageModel, make_named: MakeModel) -> None:
    other = make_named("other", hidden=8, layers=1)
    with pytest.raises(DraftTreeModelError, match="made for the draft small, and other is another model"):
        load_alignment(saved / "alignment", other, target)
    with pytest.raises(DraftTreeModelError, match="maps states of width 16, and those given have 8"):
        load_acceptance(saved / "acceptance", other, target, an_alignment())


def test_a_predictor_refuses_another_alignment_than_it_was_trained_with(
    saved: Path, draft: LanguageModel, target: LanguageModel
) -> None:
    with pytest.raises(DraftTreeModelError, match="or has another alignment"):
        load_acceptance(saved / "acceptance", draft, target, an_alignment(seed=1))
    with pytest.raises(DraftTreeModelError, match="hidden_size 32 is not that of the alignment, 16"):
        load_acceptance(saved / "acceptance", draft, target, AffineAlignment(16, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_models_in_another_precision_are_recognised(
    saved: Path, make_model: Callable[..., PreTrainedModel], kind: str
) -> None:
    draft = LanguageModel(make_model("llama", hidden=16, layers=1, seed=3).bfloat16(), prepack=False)
    load(kind, saved, draft, LanguageModel(make_model("llama").bfloat16(), prepack=False))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_named_with_the_way_out(
    folders: Path, draft: LanguageModel, target: LanguageModel, kind: str
) -> None:
    (folders / kind / f"{kind}.safetensors").unlink()
    with pytest.raises(DraftTreeModelError, match=rf"{kind}\.safetensors is missing; fit one: .*fit {kind}"):
        load(kind, folders, draft, target)
    (folders / kind / f"{kind}.json").unlink()
    with pytest.raises(DraftTreeModelError, match=rf"it has no {kind}\.json\. Give its folder, or the name of one"):
        load(kind, folders, draft, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_weights_that_are_cut_short_are_refused(
    folders: Path, draft: LanguageModel, target: LanguageModel, kind: str, kept: float
) -> None:
    path = folders / kind / f"{kind}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DraftTreeModelError, match=rf"{kind}\.safetensors is damaged"):
        load(kind, folders, draft, target)


@pytest.mark.parametrize(("kind", "name"), [("alignment", "weight"), ("acceptance", "first.bias")])
@pytest.mark.parametrize("damage", ["nan", "missing", "narrow", "more"])
def test_tensors_that_are_broken_missing_or_of_another_shape_are_refused(
    folders: Path, draft: LanguageModel, target: LanguageModel, kind: str, name: str, damage: str
) -> None:
    path = folders / kind / f"{kind}.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors[name]
    elif damage == "narrow":
        tensors[name] = tensors[name][:4].contiguous()
    elif damage == "more":
        tensors["something"] = torch.zeros(2)
    else:
        tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path)
    reseal(path.with_suffix(".json"))
    with pytest.raises(DraftTreeModelError, match="holds NaN or infinite" if damage == "nan" else "is damaged"):
        load(kind, folders, draft, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["draft_probe", "target_probe"])
def test_a_probe_that_is_missing_or_not_a_number_is_refused(
    folders: Path, draft: LanguageModel, target: LanguageModel, kind: str, key: str
) -> None:
    path = folders / kind / f"{kind}.safetensors"
    tensors = load_file(path)
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, path)
    reseal(path.with_suffix(".json"))
    with pytest.raises(DraftTreeModelError, match=f"was made for the {key.removesuffix('_probe')}"):
        load(kind, folders, draft, target)
    del tensors[key]
    save_file(tensors, path)
    reseal(path.with_suffix(".json"))
    with pytest.raises(DraftTreeModelError, match=f"is damaged .*{key}"):
        load(kind, folders, draft, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "specgym-2"}, "has the format 'specgym-2', and this version reads specgym-"),
        ({"shape": None}, "shape must be an object"),
        ({"draft": 3}, "draft and target names"),
        ({"shape": {}}, "is damaged or does not fit"),
        ({"shape": {"draft_size": 16, "target_size": 31}}, "is damaged or does not fit"),
        ({"shape": {"hidden_size": 32, "label": "luck"}}, "is damaged or does not fit"),
        ({"shape": {"hidden_size": 1e400}}, "is damaged or does not fit"),
    ],
    ids=str,
)
def test_a_description_that_makes_no_sense_is_refused(
    folders: Path, draft: LanguageModel, target: LanguageModel, kind: str, changed: dict[str, Any], message: str
) -> None:
    reseal(folders / kind / f"{kind}.json", **changed)
    with pytest.raises(DraftTreeModelError, match=message):
        load(kind, folders, draft, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "{}", "\ud800"])
def test_a_description_that_is_none_is_refused(
    folders: Path, draft: LanguageModel, target: LanguageModel, kind: str, text: str
) -> None:
    (folders / kind / f"{kind}.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(DraftTreeModelError, match=rf"{kind}\.json is damaged"):
        load(kind, folders, draft, target)


def test_the_usual_ones_lie_beside_the_draft(tmp_path: Path, target: LanguageModel, make_named: MakeModel) -> None:
    draft = make_named(str(tmp_path / "Mine"), hidden=16, layers=1, seed=3)
    assert usual_alignment(draft, target) is None
    assert usual_acceptance(draft, target, an_alignment()) is None
    save_alignment(an_alignment(), tmp_path / "Mine-alignment", draft, target)
    save_acceptance(a_predictor(), tmp_path / "Mine-acceptance", draft, target, an_alignment())
    alignment = usual_alignment(draft, target)
    assert alignment is not None
    assert torch.equal(alignment.weight, an_alignment().weight)
    predictor = usual_acceptance(draft, target, alignment)
    assert predictor is not None
    assert predictor.shape.label == "probability"
    with pytest.raises(DraftTreeModelError, match="made for the target big, and other is another model"):
        usual_alignment(draft, make_named("other", seed=9))


def test_what_ships_for_the_draft_with_another_target_is_not_usual(
    folders: Path, draft: LanguageModel, target: LanguageModel, make_named: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        (folders / kind).rename(folders / f"small-{kind}")
    monkeypatch.setattr(files, "_SHIPPED", folders)
    alignment = usual_alignment(draft, target)
    assert alignment is not None
    assert usual_acceptance(draft, target, alignment) is not None
    assert usual_acceptance(draft, target, an_alignment(seed=1)) is None
    for other in (make_named("other", seed=9), make_named("wider", hidden=48)):
        assert usual_alignment(draft, other) is None
    (folders / "small-alignment" / "alignment.safetensors").unlink()
    with pytest.raises(DraftTreeModelError, match="missing"):
        usual_alignment(draft, target)
