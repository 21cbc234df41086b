"""Heads as files: what is written is read again, and what does not fit or is damaged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa import files as module
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder
from specgym.decoding.decoders.medusa.files import DESCRIPTION, WEIGHTS, load_heads, save_heads, usual_heads
from specgym.decoding.decoders.medusa.heads import MedusaHeads, MedusaHeadsError
from specgym.decoding.loading.find_model import load_model
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.sealing import reseal
from tests.helpers.small_medusa_heads import random_heads

MakeModel = Callable[..., PreTrainedModel]
MakeTarget = Callable[..., LanguageModel]
KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "two blocks": {"blocks": 2},
    "no blocks, own output": {"blocks": 0, "own_output": True},
    "reduced": {"vocabulary": (0, 7, 50, 95)},
    "all": {"blocks": 2, "own_output": True, "vocabulary": (3, 7, 50)},
}
HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def make_target(make_model: MakeModel) -> MakeTarget:
    """A target of some name; more as for `make_model`."""

    def make(name: str = "first", family: str = "llama", **more: Any) -> LanguageModel:
        model = make_model(family, **more)
        model.name_or_path = name
        return LanguageModel(model, prepack=False)

    return make


@pytest.fixture(scope="module")
def target(make_target: MakeTarget) -> LanguageModel:
    return make_target()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, target: LanguageModel) -> Path:
    heads = random_heads(target.model, 2)
    heads.accuracies = ((0.5, 0.25), (0.125,))
    folder = tmp_path_factory.mktemp("saved")
    save_heads(heads, folder, target)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Folder of two heads with accuracies; to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "heads"))


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / DESCRIPTION).read_text())


def rewrite(folder: Path, **changed: Any) -> None:
    reseal(folder / DESCRIPTION, **changed)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_heads_come_back_as_they_were_saved(tmp_path: Path, target: LanguageModel, kind: dict[str, Any]) -> None:
    heads = random_heads(target.model, 3, **kind)
    heads.accuracies = ((0.5, 0.25, 0.0), (1.0,), (0.3333,))
    save_heads(heads, tmp_path / "new" / "exact", target, dtype=torch.float32)
    back = load_heads(tmp_path / "new" / "exact", target)
    assert back.shape == heads.shape
    assert back.accuracies == heads.accuracies
    assert not back.training
    assert torch.equal(back(HIDDEN), heads(HIDDEN))
    assert torch.equal(back.candidates(HIDDEN[0], 3, 3), heads.candidates(HIDDEN[0], 3, 3))
    save_heads(heads, tmp_path / "half", target)  # float16
    back = load_heads(str(tmp_path / "half"), target)
    assert {parameter.dtype for parameter in back.parameters()} == {torch.float32}
    torch.testing.assert_close(back(HIDDEN), heads(HIDDEN), atol=0.02, rtol=0.01)


def test_files_hold_no_more_than_the_heads_and_a_card_only_where_one_is_given(
    tmp_path: Path, target: LanguageModel
) -> None:
    heads = random_heads(target.model, 2)
    save_heads(heads, tmp_path, target)
    assert {path.name for path in tmp_path.iterdir()} == {DESCRIPTION, WEIGHTS}
    stored = load_file(tmp_path / WEIGHTS)
    assert {name: value.dtype for name, value in stored.items()} == {
        "weight": torch.float16,
        "bias": torch.float16,
        "probe": torch.float32,
    }
    assert described(tmp_path)["target"] == "first"
    save_heads(heads, tmp_path, target, card="# Of heads\n")
    assert (tmp_path / "README.md").read_text() == "# Of heads\n"


def test_heads_without_measured_accuracies_have_none_afterwards(tmp_path: Path, target: LanguageModel) -> None:
    save_heads(random_heads(target.model, 2), tmp_path, target)
    assert load_heads(tmp_path, target).accuracies == ()


def test_the_same_target_in_another_precision_is_recognised(folder: Path, make_model: MakeModel) -> None:
    model = make_model("llama").bfloat16()
    heads = load_heads(folder, LanguageModel(model, prepack=False))
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}  # as that of the output layer
    decoder = MedusaDecoder(Pair(model), heads)
    assert len(decoder.generate([1, 2, 3], max_new_tokens=8).tokens) == 8


def test_a_decoder_takes_a_folder(folder: Path, target: LanguageModel) -> None:
    decoder = MedusaDecoder(Pair(target), str(folder))
    assert [knob.high for knob in decoder.knobs] == [2, 64]
    assert decoder.generate([1, 2, 3], max_new_tokens=8).tokens
    # The tree is built by the accuracies in the file: three candidates of 0.5, 0.25 and 0.0625 are all there are.
    assert len(decoder.tree_of({"heads": 2, "tree_size": 64}, 9)) == 4


@pytest.mark.parametrize(
    "more", [{"seed": 1}, {"hidden": 16}, {"vocabulary": 60}, {"layers": 1}, {"family": "mistral", "seed": 3}], ids=str
)
def test_heads_of_another_target_are_refused_by_name(
    folder: Path, make_target: MakeTarget, more: dict[str, Any]
) -> None:
    with pytest.raises(MedusaHeadsError, match="made for the target first, and second is another model"):
        load_heads(folder, make_target("second", **more))


def test_heads_are_refused_by_a_target_that_was_trained_further_unless_they_are_to_be_tried(
    tmp_path: Path,
) -> None:
    target, _ = load_model("tiny-3m", dtype=torch.float32)
    save_heads(MedusaHeads.for_target(target, 1), tmp_path, LanguageModel(target))
    with torch.no_grad():  # as eight bits have it, which is still the same target
        for parameter in target.model.layers.parameters():
            scale = parameter.abs().amax() / 127
            parameter.copy_((parameter / scale).round() * scale)
    load_heads(tmp_path, LanguageModel(target))
    optimiser = torch.optim.AdamW(target.parameters(), lr=1e-4)
    ids = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        optimiser.zero_grad()
        target(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    trained = LanguageModel(target.eval(), prepack=False)
    with pytest.raises(MedusaHeadsError, match=r"tiny-3m is another model \(or was trained further.*strict=False"):
        load_heads(tmp_path, trained)
    assert load_heads(tmp_path, trained, strict=False).shape.heads == 1


def test_a_folder_that_is_missing_or_empty_is_named_with_the_way_out(tmp_path: Path, target: LanguageModel) -> None:
    for name in (tmp_path / "none", tmp_path):
        with pytest.raises(MedusaHeadsError, match=f"no Medusa heads in {name}.*fit medusa --target first"):
            load_heads(name, target)


def test_a_file_of_weights_that_is_missing_is_named(folder: Path, target: LanguageModel) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(MedusaHeadsError, match=f"{WEIGHTS} is missing"):
        load_heads(folder, target)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_weights_that_are_cut_short_are_refused(folder: Path, target: LanguageModel, kept: float) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(MedusaHeadsError, match=f"{WEIGHTS} is damaged"):
        load_heads(folder, target)


def test_weights_with_a_damaged_header_are_refused(folder: Path, target: LanguageModel) -> None:
    path = folder / WEIGHTS
    whole = bytearray(path.read_bytes())
    whole[8:40] = b"x" * 32
    path.write_bytes(bytes(whole))
    with pytest.raises(MedusaHeadsError, match=f"{WEIGHTS} is damaged"):
        load_heads(folder, target)


@pytest.mark.parametrize("name", ["weight", "bias", "probe"])
@pytest.mark.parametrize("damage", ["nan", "infinite", "missing", "narrow"])
def test_tensors_that_are_broken_missing_or_of_another_shape_are_refused(
    folder: Path, target: LanguageModel, name: str, damage: str
) -> None:
    tensors = load_file(folder / WEIGHTS)
    if damage == "missing":
        del tensors[name]
    elif damage == "narrow":
        tensors[name] = tensors[name][..., :8].contiguous()
    else:
        tensors[name].view(-1)[3] = float("nan") if damage == "nan" else float("inf")
    save_file(tensors, folder / WEIGHTS)
    reseal(folder / DESCRIPTION)
    if name == "probe" and damage != "missing":
        message = "made for the target first"
    else:
        message = "holds NaN or infinite" if damage in ("nan", "infinite") else f"{WEIGHTS} is damaged"
    with pytest.raises(MedusaHeadsError, match=message):
        load_heads(folder, target)


@pytest.mark.parametrize("tokens", [[3, 1, 2], [0, 1, 96], [5, 5, 6]])
def test_a_vocabulary_that_makes_no_sense_is_refused(folder: Path, target: LanguageModel, tokens: list[int]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "vocabulary": torch.tensor(tokens, dtype=torch.int32)}, folder / WEIGHTS)
    reseal(folder / DESCRIPTION)
    with pytest.raises(MedusaHeadsError, match=f"{folder / WEIGHTS} is damaged .*vocabulary must list token ids"):
        load_heads(folder, target)


def test_weights_that_nothing_describes_are_refused(folder: Path, target: LanguageModel) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "output": torch.zeros(2, 96, 32)}, folder / WEIGHTS)
    reseal(folder / DESCRIPTION)
    with pytest.raises(MedusaHeadsError, match=f"does not fit {DESCRIPTION}"):
        load_heads(folder, target)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "specgym-medusa-3"}, "has the format 'specgym-medusa-3', and this version reads specgym-medusa-2"),
        ({"accuracies": [[0.5], [1.5]]}, "accuracies must be shares"),
        ({"accuracies": [[0.5], [-0.1]]}, "accuracies must be shares"),
        ({"accuracies": [[0.5], [float("nan")]]}, "accuracies must be shares"),
        ({"accuracies": [[0.5]]}, "a row a head"),
        ({"accuracies": [["often"], [0.5]]}, "is damaged"),
        ({"accuracies": None}, "is damaged"),
        ({"shape": {}}, "is damaged"),
        ({"shape": {"heads": 2, "hidden_size": 32, "vocabulary_size": 96, "width": 3}}, "is damaged"),
        ({"shape": {"heads": 2, "hidden_size": float("inf"), "vocabulary_size": 96}}, "is damaged"),
        ({"shape": {"heads": 2, "hidden_size": 32, "vocabulary_size": 96, "blocks": 2}}, "does not fit"),
        ({"shape": {"heads": 2, "hidden_size": 32, "vocabulary_size": 96, "blocks": -1}}, "blocks must be"),
    ],
    ids=str,
)
def test_a_description_that_makes_no_sense_is_refused(
    folder: Path, target: LanguageModel, changed: dict[str, Any], message: str
) -> None:
    rewrite(folder, **changed)
    with pytest.raises(MedusaHeadsError, match=message) as refused:
        load_heads(folder, target)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", '{"target": "first"}', '"specgym-medusa-1"', "\ud800"])
def test_a_description_that_is_no_description_is_refused(folder: Path, target: LanguageModel, text: str) -> None:
    (folder / DESCRIPTION).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(MedusaHeadsError, match=f"{DESCRIPTION} is damaged"):
        load_heads(folder, target)


@pytest.mark.parametrize("missing", ["target", "accuracies", "shape"])
def test_a_description_without_one_of_its_parts_is_refused(folder: Path, target: LanguageModel, missing: str) -> None:
    left = described(folder)
    del left[missing]
    (folder / DESCRIPTION).write_text(json.dumps(left))
    reseal(folder / DESCRIPTION)
    with pytest.raises(MedusaHeadsError, match=f"is damaged .*{missing}"):
        load_heads(folder, target)


def test_the_usual_heads_lie_beside_the_target(tmp_path: Path, make_target: MakeTarget) -> None:
    target = make_target(str(tmp_path / "my-target"))
    with pytest.raises(MedusaHeadsError, match=r"no Medusa heads ship for .*my-target-medusa has none; train"):
        usual_heads(target)
    with pytest.raises(MedusaHeadsError, match="no Medusa heads ship"):
        MedusaDecoder(Pair(target))
    save_heads(random_heads(target.model, 3), tmp_path / "my-target-medusa", target)
    assert usual_heads(target).shape.heads == 3
    assert MedusaDecoder(Pair(target)).heads.shape.heads == 3
    other = make_target(str(tmp_path / "my-target"), seed=5)
    with pytest.raises(MedusaHeadsError, match="another model"):
        usual_heads(other)


def test_a_write_that_fails_leaves_the_old_heads_whole(
    folder: Path, target: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="no space left"):
            save_heads(random_heads(target.model, 3, seed=1), folder, target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # and nothing lies about
    load_heads(folder, target)


def test_a_write_that_fails_between_the_two_files_is_noticed(
    folder: Path, target: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_sealed", fails)
        with pytest.raises(OSError, match="no space left"):
            save_heads(random_heads(target.model, 3, seed=1), folder, target)
    with pytest.raises(MedusaHeadsError, match=f"does not fit {DESCRIPTION}"):
        load_heads(folder, target)
