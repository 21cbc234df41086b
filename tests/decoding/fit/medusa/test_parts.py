"""The parts that training Medusa heads is made of: hidden states, labels, loss, accuracies, batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoders.medusa.heads import MedusaHeads
from specgym.decoding.errors import FitError
from specgym.decoding.fit.measure import measure_domains
from specgym.decoding.fit.medusa.heads import heads_loss
from specgym.decoding.fit.medusa.report import accuracies, measure_speed
from specgym.decoding.fit.text.corpus_text import PositionBatches
from specgym.decoding.fit.text.prompts import JUDGING, SPEED, TRAINING
from specgym.decoding.fit.text.states import IGNORED, hidden_states
from specgym.decoding.fit.text.target_text import TargetText, frequent_tokens
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.counting import counting_model


def a_text(folder: Path) -> TargetText:
    """Prompts of 1s, then 2, 3, 4, ...: three texts, of which the second ended early."""
    tokens = np.zeros((3, 9), dtype=np.int32)
    for row, (prompt, end) in enumerate(((4, 9), (3, 6), (4, 9))):
        tokens[row, :end] = [1] * prompt + list(range(2, 2 + end - prompt))
    folder.mkdir(parents=True, exist_ok=True)
    return TargetText(
        tokens=tokens, prompts=np.array([4, 3, 4]), ends=np.array([9, 6, 9]), domain=np.array([0, 1, 0]),
        side=np.array([TRAINING, JUDGING, SPEED]), domains=("one", "two"), digest="0" * 64, folder=folder,
    )  # fmt: skip


def test_prompts_are_never_trained_on(tmp_path: Path) -> None:
    text = a_text(tmp_path)
    states = hidden_states(counting_model(300), text)
    labels = states.labels(np.arange(len(states)), 3)
    # Of the first text positions 2 to 6, of the second 1 to 3; the third needs none.
    assert states.row.tolist() == [0] * 5 + [1] * 3
    assert states.place.tolist() == [2, 3, 4, 5, 6, 1, 2, 3]
    ignored = IGNORED
    assert labels.tolist() == [
        [2, 3, 4, 5, 6, 2, 3, 4],
        [3, 4, 5, 6, ignored, 3, 4, ignored],
        [4, 5, 6, ignored, ignored, 4, ignored, ignored],
    ]
    assert states.of_side(TRAINING).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_states_are_those_that_the_target_has_without_padding_and_are_kept(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model, text = make_model(family).eval(), a_text(tmp_path)
    states = hidden_states(model, text)
    target = LanguageModel(model, prepack=False)
    for row in (0, 1):
        ids = torch.from_numpy(text.tokens[row, : text.ends[row]].astype(np.int64))
        alone = target.fresh().forward(ids, hidden=True).hidden
        assert alone is not None
        chosen = np.flatnonzero(states.row == row)
        torch.testing.assert_close(states.hidden(chosen).float(), alone[states.place[chosen]], atol=4e-3, rtol=4e-3)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    np.testing.assert_array_equal(hidden_states(model, text).states, states.states)
    (tmp_path / "hidden.npy").write_bytes(b"nothing of the kind")
    with pytest.raises(FitError, match=r"hidden\.npy is damaged .*remove it"):
        hidden_states(model, text)


def test_the_loss_weighs_heads_and_leaves_out_what_has_no_label() -> None:
    heads = MedusaHeads.for_target(counting_model(300), 2)
    hidden, labels = torch.randn(4, 64), torch.tensor([[21, 22, 23, 24], [22, IGNORED, 24, IGNORED]])
    scores = heads(hidden).log_softmax(-1)
    first = -scores[0, range(4), labels[0]].mean()
    second = -scores[1, [0, 2], [22, 24]].mean()
    torch.testing.assert_close(heads_loss(heads, hidden, labels), 0.8 * first + 0.64 * second)


def test_the_loss_leaves_out_tokens_that_heads_cannot_propose() -> None:
    heads = MedusaHeads.for_target(counting_model(300), 1, vocabulary=(5, 21, 22))
    hidden = torch.randn(2, 64)
    both = heads_loss(heads, hidden, torch.tensor([[21, 100]]))
    torch.testing.assert_close(both, heads_loss(heads, hidden[:1], torch.tensor([[21]])))
    assert heads_loss(heads, hidden, torch.tensor([[100, 101]])).item() == 0


def test_accuracies_count_ranks_by_domain(tmp_path: Path) -> None:
    model, text = counting_model(300), a_text(tmp_path)
    states = hidden_states(model, text)
    heads = MedusaHeads.for_target(model, 3)
    positions = np.arange(len(states))
    whole, by_domain = accuracies(heads, states, positions)
    assert whole.counts.tolist() == [8, 6, 4]
    assert by_domain["two"].counts.tolist() == [3, 2, 1]
    labels = states.labels(positions, 3)
    scores = heads(states.hidden(positions))
    for head in range(3):
        known = labels[head] != IGNORED
        order = scores[head, known].argsort(-1, descending=True)[:, :64]
        expected = (order == labels[head, known].unsqueeze(-1)).float().mean(0)
        np.testing.assert_allclose(whole.shares[head], expected.numpy(), atol=1e-6)


def test_frequent_tokens_are_those_that_the_target_wrote_in_texts_to_train_on(tmp_path: Path) -> None:
    text = a_text(tmp_path)
    text.tokens[0, 4:9] = [9, 7, 9, 7, 8]
    text.tokens[1, 3:6] = 5
    assert sorted(text.written().tolist()) == [7, 7, 8, 9, 9]
    assert frequent_tokens(text.written(), 2) == (7, 9)
    assert frequent_tokens(text.written(), 10) == (7, 8, 9)
    assert frequent_tokens(text.written(), 0) == ()
    assert frequent_tokens(text.written(), 5, vocabulary_size=300) == (0, 1, 7, 8, 9)
    assert frequent_tokens(text.written(), 2, vocabulary_size=300) == (7, 9)


def test_batches_need_no_history_and_visit_every_position_in_an_epoch() -> None:
    batches = PositionBatches(np.arange(100, 112), 4, 0, "key")
    third = batches(7)
    assert torch.equal(PositionBatches(np.arange(100, 112), 4, 0, "key")(7), third)
    epoch = torch.cat([batches(step) for step in range(3)])
    assert sorted(epoch.tolist()) == list(range(100, 112))
    assert batches.digest() != PositionBatches(np.arange(100, 112), 4, 0, "other").digest()
    assert batches.digest() != PositionBatches(np.arange(100, 111), 4, 0, "key").digest()


def test_scores_of_all_heads_are_never_in_memory_together(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama", vocabulary=96).requires_grad_(False)
    heads, hidden = MedusaHeads.for_target(model, 4), torch.randn(30, 32)
    labels = torch.randint(0, 96, (4, 30))
    sizes, kept = list[int](), list[int]()
    model.lm_head.register_forward_hook(lambda _, __, scores: sizes.append(scores.numel()))

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.numel() if value.shape[-1] == 96 else 0)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = heads_loss(heads, hidden, labels)
    assert max(sizes) <= 4 * 8 * 96  # of a quarter of the positions, rounded up
    assert sum(kept) == 0  # nor for the gradient
    loss.backward()
    gradient = heads.weight.grad
    assert gradient is not None
    heads.zero_grad()
    scores = heads(hidden).log_softmax(-1)
    at_once = -sum(0.8 ** (k + 1) * scores[k, range(30), labels[k]].mean() for k in range(4))
    at_once.backward()
    torch.testing.assert_close(gradient, heads.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "way_out"), [(torch.float32, ""), (torch.bfloat16, "give --dtype float32, or ")])
def test_states_that_float16_cannot_hold_are_refused_and_leave_no_file(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], dtype: torch.dtype, way_out: str
) -> None:
    model, text = make_model("llama"), a_text(tmp_path)
    torch.nn.Module.to(model, dtype)
    model.name_or_path = "the-target"
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    with pytest.raises(FitError, match=f"the-target in .* above 65,504.*: {way_out}choose another model"):
        hidden_states(model, text)
    assert not list(tmp_path.iterdir())


def test_what_takes_long_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = counting_model(300), a_text(tmp_path)
    heads = MedusaHeads.for_target(model, 1)
    accuracies(heads, hidden_states(model, text), np.arange(8))
    measure_speed(Pair(model), heads, {"notes": [[20, 21]]}, 1, 2)
    measure_domains(model, {"notes": np.arange(40)})
    shown = capsys.readouterr().err
    assert all(f"{what}: 100%" in shown for what in ("accuracies", "speed, notes", "held-out text"))
