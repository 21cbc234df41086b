"""Narrower feed-forward parts: which neurons stay, and which architectures are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from specgym.decoding.errors import FitError
from specgym.decoding.fit.draft.init_from_target import feed_forward_width, layers_of, narrow, take_layers

MakeModel = Callable[..., PreTrainedModel]
OUTWARD = {"llama": "mlp.down_proj", "qwen2": "mlp.down_proj", "opt": "fc2", "phi": "mlp.fc2",
           "gpt_neox": "mlp.dense_4h_to_h"}  # fmt: skip
IDS = torch.arange(12)[None]


@pytest.mark.parametrize("family", sorted(OUTWARD))
def test_neurons_that_add_nothing_go_first(make_model: MakeModel, family: str) -> None:
    draft, _ = take_layers(make_model(family), [0, 1])
    draft.eval()
    silent = torch.tensor([3, 17, 40, 41, 63])
    with torch.no_grad():
        for layer in layers_of(draft)[1]:
            layer.get_parameter(f"{OUTWARD[family]}.weight")[:, silent] = 0
        before = draft(IDS).logits
        narrow(draft, 59)
        assert feed_forward_width(draft) == 59
        torch.testing.assert_close(draft(IDS).logits, before)
    # A model made anew from its configuration has a place for every tensor.
    type(draft)(draft.config).load_state_dict(draft.state_dict())


def test_a_neuron_counts_by_what_leads_into_it_and_out_of_it(make_model: MakeModel) -> None:
    draft, _ = take_layers(make_model("llama"), [0])
    mlp: Any = layers_of(draft)[1][0].mlp
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            part.weight.fill_(1.0)
        mlp.gate_proj.weight[5] = 9.0
        mlp.up_proj.weight[7] = 4.0
        mlp.down_proj.weight[:, 7] = 4.0
        mlp.down_proj.weight[:, 9] = 5.0
    narrow(draft, 2)
    assert (mlp.gate_proj.weight[:, 0].tolist(), mlp.up_proj.weight[:, 0].tolist()) == ([9.0, 1.0], [1.0, 4.0])
    assert mlp.down_proj.weight[0].tolist() == [1.0, 4.0]


def test_the_target_keeps_its_neurons(make_model: MakeModel) -> None:
    target = make_model("llama")
    draft, _ = take_layers(target, [0, 1])
    narrow(draft, 8)
    assert (feed_forward_width(draft), feed_forward_width(target)) == (8, 64)
    assert (draft.config.intermediate_size, target.config.intermediate_size) == (8, 64)


@pytest.mark.parametrize("width", [0, -1, 65])
def test_widths_that_are_not_there_are_refused(make_model: MakeModel, width: int) -> None:
    with pytest.raises(FitError, match=f"--intermediate must be 1 to 64, .* got {width}"):
        narrow(take_layers(make_model("llama"), [0])[0], width)


def test_other_feed_forward_parts_are_refused_by_name(make_model: MakeModel) -> None:
    with pytest.raises(FitError, match=r"GPT2Block has no feed-forward part of linear layers gate_proj/.*leave out"):
        narrow(take_layers(make_model("gpt2"), [0])[0], 8)
    odd = take_layers(make_model("llama"), [0, 1])[0]
    layers_of(odd)[1][1].get_submodule("mlp").down_proj = nn.Linear(7, 32)
    with pytest.raises(FitError, match="the layers of LlamaForCausalLM are not equally wide: leave out --intermediate"):
        narrow(odd, 4)
