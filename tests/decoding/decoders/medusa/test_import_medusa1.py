"""Heads in the layout that the authors of Medusa publish: read where shapes allow, refused by name where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa.decoder import MedusaDecoder
from specgym.decoding.decoders.medusa.files import load_heads, usual_heads
from specgym.decoding.decoders.medusa.heads import MedusaHeadsError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel

MakeModel = Callable[..., PreTrainedModel]
HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Block of the authors' code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.act = nn.SiLU()

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.act(self.linear(inputs))


def authors_heads(count: int = 3, blocks: int = 1, width: int = 32, tokens: int = 96) -> nn.ModuleList:
    """The authors' own modules with random weights."""
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(*(Block(width) for _ in range(blocks)), nn.Linear(width, tokens, bias=False))
        for _ in range(count)
    )


def publish(folder: Path, heads: nn.ModuleList, kind: str, prefix: str = "", **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    described = {"medusa_num_heads": len(heads), "base_model_name_or_path": "vicuna", **config}
    (folder / "config.json").write_text(json.dumps(described))
    tensors = {prefix + name: value for name, value in heads.state_dict().items()}
    if kind == "pt":
        torch.save(tensors, folder / "medusa_lm_head.pt")
    else:
        save_file(tensors, folder / "medusa_lm_head.safetensors")


@pytest.fixture(scope="module")
def target(make_model: MakeModel) -> LanguageModel:
    model = make_model("llama")
    model.name_or_path = "first"
    return LanguageModel(model, prepack=False)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_authors_layout_gives_the_authors_scores(
    tmp_path: Path, target: LanguageModel, kind: str, prefix: str, blocks: int
) -> None:
    published = authors_heads(blocks=blocks)
    publish(tmp_path, published, kind, prefix, medusa_num_layers=blocks)
    heads = load_heads(tmp_path, target)
    assert (heads.shape.heads, heads.shape.blocks, heads.shape.own_output) == (3, blocks, True)
    expected = torch.stack([head(HIDDEN) for head in published])
    torch.testing.assert_close(heads(HIDDEN), expected, atol=1e-5, rtol=1e-4)


def test_one_block_is_assumed_where_the_configuration_says_nothing(tmp_path: Path, target: LanguageModel) -> None:
    publish(tmp_path, authors_heads(), "pt")
    assert load_heads(tmp_path, target).shape.blocks == 1


def test_heads_in_half_precision_are_read(tmp_path: Path, target: LanguageModel) -> None:
    published = authors_heads()
    expected = torch.stack([head(HIDDEN) for head in published])
    publish(tmp_path, published.half(), "safetensors")
    torch.testing.assert_close(load_heads(tmp_path, target)(HIDDEN), expected, atol=1e-2, rtol=1e-2)


def test_published_heads_decode_and_lie_beside_the_target(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model("llama")
    model.name_or_path = str(tmp_path / "vicuna")
    publish(tmp_path / "vicuna-medusa", authors_heads(), "pt")
    pair = Pair(model)
    assert usual_heads(pair.target).shape.heads == 3
    assert len(MedusaDecoder(pair).generate([1, 2, 3], max_new_tokens=9).tokens) == 9


@pytest.mark.parametrize("shape", [{"width": 16}, {"tokens": 100}], ids=str)
def test_heads_whose_shapes_do_not_fit_are_refused_by_name(
    tmp_path: Path, target: LanguageModel, shape: dict[str, int]
) -> None:
    publish(tmp_path, authors_heads(**shape), "safetensors")
    with pytest.raises(MedusaHeadsError, match=r"but this target needs .*; the heads were made for vicuna"):
        load_heads(tmp_path, target)


@pytest.mark.parametrize("config", [{"medusa_num_heads": 4}, {"medusa_num_layers": 2}], ids=str)
def test_a_configuration_that_promises_more_than_there_is_is_refused(
    tmp_path: Path, target: LanguageModel, config: dict[str, Any]
) -> None:
    publish(tmp_path, authors_heads(), "pt", **config)
    with pytest.raises(MedusaHeadsError, match=r"medusa_lm_head.pt lacks the tensor '|has shape"):
        load_heads(tmp_path, target)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"medusa_num_heads": "many"}', '{"medusa_num_heads": null}'], ids=str
)
def test_a_configuration_that_is_missing_or_damaged_is_refused(
    tmp_path: Path, target: LanguageModel, text: str | None
) -> None:
    publish(tmp_path, authors_heads(), "pt")
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(MedusaHeadsError, match=r"config.json is missing or damaged"):
        load_heads(tmp_path, target)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_weights_that_are_cut_short_are_refused(tmp_path: Path, target: LanguageModel, kind: str, kept: float) -> None:
    publish(tmp_path, authors_heads(), kind)
    path = tmp_path / f"medusa_lm_head.{kind}"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(MedusaHeadsError, match=f"medusa_lm_head.{kind} is damaged"):
        load_heads(tmp_path, target)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"0.0.linear.weight": 3.0}, 5], ids=str)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, target: LanguageModel, content: Any) -> None:
    publish(tmp_path, authors_heads(), "pt")
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(MedusaHeadsError, match=r"medusa_lm_head.pt is damaged .*something else than tensors by name"):
        load_heads(tmp_path, target)


class Harmful:
    """A pickle of it makes a file wherever it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(tmp_path: Path, target: LanguageModel) -> None:
    publish(tmp_path, authors_heads(), "pt")
    weights, proof = tmp_path / "medusa_lm_head.pt", tmp_path / "ran"
    torch.save({**authors_heads().state_dict(), "more": Harmful(proof)}, weights)
    with pytest.raises(MedusaHeadsError, match=r"medusa_lm_head.pt is damaged"):
        load_heads(tmp_path, target)
    assert not proof.exists()
    torch.load(weights, weights_only=False)
    assert proof.exists()  # it would have


def test_published_weights_that_are_nan_are_refused(tmp_path: Path, target: LanguageModel) -> None:
    heads = authors_heads()
    with torch.no_grad():
        next(heads.parameters())[0] = float("nan")
    publish(tmp_path, heads, "pt")
    with pytest.raises(MedusaHeadsError, match="NaN or infinite weights"):
        load_heads(tmp_path, target)
