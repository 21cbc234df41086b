"""A target in training with its heads: the loss of both, their learning rates, adapters."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa.heads import MedusaHeads
from specgym.decoding.errors import FitError
from specgym.decoding.fit.loop import train
from specgym.decoding.fit.medusa.heads import heads_loss
from specgym.decoding.fit.medusa.joint import JointModel
from specgym.decoding.fit.settings import LoopSettings
from specgym.decoding.fit.text.corpus_text import PositionBatches
from specgym.decoding.fit.text.states import IGNORED

MakeModel = Callable[..., PreTrainedModel]


def test_the_loss_is_the_divergence_over_what_was_written_and_the_heads_loss_by_its_weight(
    make_model: MakeModel,
) -> None:
    model = make_model("llama", vocab_size=40).eval()
    together = JointModel(model, MedusaHeads.for_target(model, 2), heads_weight=0.5, lora_rank=0)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 0, 0, 0]])
    prompts, ends = torch.tensor([3, 1]), torch.tensor([7, 4])
    together.before_step(0.0)
    assert together(tokens, prompts, ends).item() == pytest.approx(0, abs=1e-6)  # it is still what it was
    original = model.state_dict()
    reference = {name: value.clone() for name, value in original.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = [tokens[0], tokens[1, :4]]
    new = [model(input_ids=row[None], output_hidden_states=True) for row in rows]
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(reference)
    old = [model(input_ids=row[None]).logits[0].log_softmax(-1) for row in rows]
    model.load_state_dict(changed)
    divergences = [
        (old[row][place].exp() * (old[row][place] - new[row].logits[0, place].log_softmax(-1))).sum()
        for row, places in ((0, (2, 3, 4, 5)), (1, (0, 1, 2)))
        for place in places
    ]
    hidden = torch.cat([new[0].hidden_states[-1][0, 1:5], new[1].hidden_states[-1][0, 0:2]])
    labels = torch.tensor([[4, 5, 6, 7, 7, 6], [5, 6, 7, IGNORED, 6, IGNORED]])
    expected = torch.stack(divergences).mean()
    together.before_step(1 / 3)
    weight = 0.5 * math.sin(math.pi / 6)
    expected = expected + weight * heads_loss(together.heads, hidden, labels)
    torch.testing.assert_close(together(tokens, prompts, ends), expected, rtol=1e-4, atol=1e-5)


def test_heads_learn_at_a_rate_of_their_own(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", vocab_size=40).eval()
    together = JointModel(model, MedusaHeads.for_target(model, 1), heads_weight=1.0, lora_rank=0)
    before = {name: value.detach().clone() for name, value in together.named_parameters()}
    text = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(0))

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = together(text[rows], torch.full((len(rows),), 2), torch.full((len(rows),), 9))
        return loss

    loop = LoopSettings(
        tokens=1, batch=4, length=9, learning_rate=1e-3, optimiser="adamw", weight_decay=0.0, warmup=0.0,
        bfloat16=False, device="cpu",
    )  # fmt: skip
    batches = PositionBatches(np.arange(4), 4, 0, "")
    train(together, loss_of, batches, loop, tmp_path / "state.pt", rates=lambda name: 4.0 if "heads." in name else 1.0)
    moved = {name: (value - before[name]).abs().max().item() for name, value in together.named_parameters()}
    # The first step of Adam moves a weight by the learning rate, whatever its gradient.
    assert moved["heads.weight"] == pytest.approx(4e-3, rel=0.01)
    assert moved["target.lm_head.weight"] == pytest.approx(1e-3, rel=0.01)


def test_heads_of_a_reduced_vocabulary_need_adapters(make_model: MakeModel) -> None:
    model = make_model("llama", vocab_size=40)
    heads = MedusaHeads.for_target(model, 1, vocabulary=(3, 5, 7))
    with pytest.raises(FitError, match=r"reduced vocabulary .* give --lora-rank"):
        JointModel(model, heads, 1.0, lora_rank=0)
    JointModel(model, heads, 1.0, lora_rank=2)


def test_adapters_without_peft_are_refused_with_the_way_out(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = make_model("llama", vocab_size=40)
    with pytest.raises(FitError, match=r'pip install "specgym\[lora\]"'):
        JointModel(model, MedusaHeads.for_target(model, 1), 1.0, lora_rank=2)
