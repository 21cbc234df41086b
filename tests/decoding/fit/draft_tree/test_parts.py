"""The parts that alignments and predictors are fitted with: paired states, verifications, agreement, reliability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment, proposals
from specgym.decoding.errors import FitError
from specgym.decoding.fit.draft_tree.acceptance import best_temperature, enough, reliability, sharpened
from specgym.decoding.fit.draft_tree.alignment import agreement, r_squared
from specgym.decoding.fit.draft_tree.verifications import Verifications, met, verifications
from specgym.decoding.fit.text.prompts import JUDGING, SPEED, TRAINING
from specgym.decoding.fit.text.states import PairedStates, paired_states
from specgym.decoding.fit.text.target_text import TargetText
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.output_layer import output_layer

MakeModel = Callable[..., PreTrainedModel]
KINDS: Any = ("match", "probability", "ratio")


def a_text(folder: Path) -> TargetText:
    """Three texts of random tokens, of which the second ended early."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 96, (3, 9)).astype(np.int32)
    tokens[1, 6:] = 0
    folder.mkdir(parents=True, exist_ok=True)
    return TargetText(
        tokens=tokens, prompts=np.array([4, 3, 4]), ends=np.array([9, 6, 9]), domain=np.array([0, 1, 0]),
        side=np.array([TRAINING, JUDGING, SPEED]), domains=("one", "two"), digest="0" * 64, folder=folder,
    )  # fmt: skip


def hand_made(draft: torch.Tensor, target: torch.Tensor, text: TargetText | None = None) -> PairedStates:
    """States given as tensors, all of one text."""
    count = len(draft)
    text = text or TargetText(
        tokens=np.zeros((1, count + 1), dtype=np.int32), prompts=np.array([1]), ends=np.array([count + 1]),
        domain=np.array([0]), side=np.array([TRAINING]), domains=("one",), digest="", folder=Path(),
    )  # fmt: skip
    row = np.zeros(count, dtype=np.int64)
    return PairedStates(
        text=text, row=row, place=np.arange(count), draft=draft.half().numpy(), target=target.half().numpy(), digest=""
    )


def test_states_of_both_models_stand_where_a_token_was_written_and_are_kept(
    tmp_path: Path, make_model: MakeModel
) -> None:
    draft, target = make_model("llama", hidden=16, layers=1, seed=3), make_model("llama")
    text = a_text(tmp_path)
    states = paired_states(draft, target, text)
    assert states.row.tolist() == [0] * 5 + [1] * 3 + [2] * 5
    assert states.place.tolist() == [3, 4, 5, 6, 7, 2, 3, 4, 3, 4, 5, 6, 7]
    assert states.written.tolist() == [*text.tokens[0, 4:9], *text.tokens[1, 3:6], *text.tokens[2, 4:9]]
    for model, read in ((draft, states.of_draft), (target, states.of_target)):
        ids = torch.from_numpy(text.tokens[1, :6].astype(np.int64))
        alone = LanguageModel(model, prepack=False).forward(ids, hidden=True).hidden
        assert alone is not None
        torch.testing.assert_close(read(np.array([5, 6, 7])), alone[2:5], atol=4e-3, rtol=4e-3)
    again = paired_states(draft, target, text)
    assert again.digest == states.digest
    assert len(list(tmp_path.glob("states-*.npy"))) == 2
    other = paired_states(make_model("llama", hidden=16, layers=1, seed=4), target, text)
    assert other.digest != states.digest
    assert len(list(tmp_path.glob("states-*.npy"))) == 3
    for path in tmp_path.glob("states-*.npy"):
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(FitError, match=r"states-.*\.npy is damaged .*remove it"):
        paired_states(draft, target, text)


def test_the_explained_share_of_variance_is_right_where_it_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(9000, 4, generator=generator) + 5
    half = target.clone()
    half[:, :2] = 5  # the mean, which explains nothing of two features out of four
    none = AffineAlignment(4, 4)
    positions = np.arange(9000)
    assert r_squared(none, hand_made(target, target), positions) == pytest.approx(1)
    assert r_squared(none, hand_made(half, target), positions) == pytest.approx(0.5, abs=0.02)
    assert r_squared(none, hand_made(torch.full_like(target, 5.0), target), positions) == pytest.approx(0, abs=0.01)
    assert r_squared(none, hand_made(-target, target), positions) < -50


@torch.no_grad()
def test_agreement_counts_likeliest_tokens_and_measures_the_divergence(make_model: MakeModel) -> None:
    model = make_model("llama")
    output = output_layer(model)
    states = hand_made(torch.randn(40, 32), torch.randn(40, 32))
    positions = np.arange(0, 40, 2)
    right = agreement(lambda _: proposals(states.of_target(positions), output), states, positions, output)
    assert (right.match, right.first) == (1, 1)
    assert right.divergence == pytest.approx(0, abs=1e-5)
    result = agreement(lambda hidden: proposals(hidden, output), states, positions, output)
    p, q = (proposals(states_of(positions), output).softmax(-1) for states_of in (states.of_target, states.of_draft))
    assert result.match == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    five = (q.topk(5).indices == p.argmax(-1, keepdim=True)).any(-1)
    assert result.first == pytest.approx(float(five.float().mean()))
    assert result.divergence == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-4)


def test_a_position_is_met_at_every_depth_whose_tokens_between_were_accepted() -> None:
    followed = np.array([True, True, False, True, True, True])
    row = np.array([0, 0, 0, 0, 1, 1])
    position, depth = met(followed, row, 3)
    nodes = set(zip(position.tolist(), depth.tolist(), strict=True))
    assert nodes == {(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (1, 2), (2, 2), (5, 2), (2, 3)}
    assert depth.tolist() == sorted(depth.tolist())
    assert met(followed[:1], row[:1], 4)[0].tolist() == [0]


@torch.no_grad()
def verified(tmp_path: Path, make_model: MakeModel, label: Any, **more: Any) -> tuple[Verifications, torch.Tensor, Any]:
    """Verifications of two random models, with the target's and the draft's logits."""
    draft, target = make_model("llama", hidden=16, layers=1, seed=3), make_model("llama")
    states = paired_states(draft, target, a_text(tmp_path))
    outputs = output_layer(draft), output_layer(target)
    torch.manual_seed(0)
    alignment = AffineAlignment(16, 32).requires_grad_(False)
    alignment.bias.copy_(torch.randn(32))
    positions = np.arange(len(states))
    data = verifications(states, positions, alignment, *outputs, label=label, children=4, deepest=2, **more)
    logits = [proposals(states.of_target(positions), outputs[1]), proposals(states.of_draft(positions), outputs[0])]
    aligned = proposals(alignment(states.of_draft(positions)), outputs[1]).log_softmax(-1)
    torch.testing.assert_close(data.aligned_log_probability, aligned.gather(1, data.tokens))
    log_q = logits[1].log_softmax(-1)
    torch.testing.assert_close(data.log_probability, log_q.gather(1, data.tokens))
    torch.testing.assert_close(data.entropy, -(log_q.exp() * log_q).sum(-1), atol=1e-4, rtol=1e-4)
    return data, logits[0], logits[1]


def test_greedy_verification_accepts_the_targets_likeliest_token_among_the_drafts_likeliest(
    tmp_path: Path, make_model: MakeModel
) -> None:
    data, target, draft = verified(tmp_path, make_model, "match")
    assert torch.equal(data.tokens, draft.topk(4).indices)
    assert torch.equal(data.labels, (data.tokens == target.argmax(-1, keepdim=True)).float())


def test_likeliest_candidates_are_accepted_with_the_targets_probability_when_sampling(
    tmp_path: Path, make_model: MakeModel
) -> None:
    data, target, draft = verified(tmp_path, make_model, "probability", temperature=0.5)
    assert torch.equal(data.tokens, draft.topk(4).indices)
    torch.testing.assert_close(data.labels, (target / 0.5).softmax(-1).gather(1, data.tokens))


def test_drawn_candidates_are_accepted_with_the_ratio_of_the_probabilities(
    tmp_path: Path, make_model: MakeModel
) -> None:
    data, target, draft = verified(tmp_path, make_model, "ratio", temperature=2.0)
    p, q = ((logits / 2).softmax(-1).gather(1, data.tokens) for logits in (target, draft))
    torch.testing.assert_close(data.labels, (p / q).clamp(max=1))
    assert not torch.equal(data.tokens, draft.topk(4).indices)
    again, _, _ = verified(tmp_path, make_model, "ratio", temperature=2.0)
    assert torch.equal(again.tokens, data.tokens)
    other, _, _ = verified(tmp_path, make_model, "ratio", temperature=2.0, seed=1)
    assert not torch.equal(other.tokens, data.tokens)


@pytest.mark.parametrize("label", KINDS)
def test_examples_of_a_node_are_its_candidates_with_the_aligned_state_and_the_depth(
    tmp_path: Path, make_model: MakeModel, label: Any
) -> None:
    data, _, _ = verified(tmp_path, make_model, label)
    last = len(data.position) - 1
    features, labels = data.examples(np.array([2, last]))
    place = int(data.position[last])
    assert features.hidden.shape == (8, 32)
    hidden = data.alignment(data.states.of_draft(np.array([2, place])))
    assert torch.equal(features.hidden[[0, 3, 4, 7]], hidden[[0, 0, 1, 1]])
    assert features.depth.tolist() == [1] * 4 + [int(data.depth[last])] * 4
    assert torch.equal(features.log_probability[4:], data.log_probability[place])
    assert features.entropy[:4].unique().tolist() == [float(data.entropy[2])]
    assert torch.equal(labels[:4], data.labels[2])
    assert data.of_side(JUDGING).tolist() == [
        node for node, position in enumerate(data.position) if position in (5, 6, 7)
    ]


def test_no_more_is_verified_than_training_asks_for(tmp_path: Path, make_model: MakeModel) -> None:
    text = a_text(tmp_path)
    text.side[:] = TRAINING, JUDGING, TRAINING
    states = paired_states(make_model("llama"), make_model("llama"), text)
    assert enough(states, 5).tolist() == list(range(8))
    assert enough(states, 6).tolist() == list(range(13))
    assert enough(states, 1000).tolist() == list(range(13))


def test_reliability_is_right_where_it_is_known() -> None:
    predictions = torch.tensor([0.05, 0.05, 0.75, 0.75, 1.0])
    outcomes = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    result = reliability(predictions, outcomes)
    assert result.brier == pytest.approx((0.05**2 + 0.95**2 + 2 * 0.25**2) / 5)
    assert result.calibration_error == pytest.approx((2 * 0.45 + 2 * 0.25) / 5)
    assert result.counts == (2, 0, 0, 0, 0, 0, 0, 2, 0, 1)
    assert result.happened[0] == pytest.approx(0.5)
    assert result.predicted[7] == pytest.approx(0.75)
    assert (result.accuracy[0], result.accuracy[7], result.accuracy[9]) == (0.5, 1, 1)
    assert reliability(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).brier == 0


def test_the_drafts_probabilities_are_calibrated_among_the_candidates() -> None:
    log_q = torch.tensor([[0.5, 0.25, 0.05]]).log()
    torch.testing.assert_close(sharpened(log_q, 0.5), torch.tensor([[0.25, 0.0625, 0.0025]]) / 0.315)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=generator)
    right = (logits / 0.25).softmax(-1).multinomial(1, generator=generator)
    outcomes = torch.zeros_like(logits).scatter(1, right, 1.0).flatten()
    log_q = logits.log_softmax(-1)
    assert best_temperature(lambda value: sharpened(log_q, value).flatten(), outcomes) == pytest.approx(0.25, rel=0.1)
