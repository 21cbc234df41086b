"""Rounds in which a draft also learns from its own text, and the divergences that it may learn by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from specgym.decoding.errors import FitError
from specgym.decoding.fit.draft import on_policy
from specgym.decoding.fit.draft.distil import DraftSettings, make_draft
from specgym.decoding.fit.draft.objectives import DIVERGENCES
from specgym.decoding.fit.draft.on_policy import MixedBatches, OnPolicyText
from specgym.decoding.fit.settings import LoopSettings, TextSettings
from specgym.decoding.fit.text.corpus_text import PositionBatches
from specgym.decoding.fit.text.prompts import JUDGING, TRAINING, Prompts
from specgym.decoding.fit.text.target_text import TargetText
from tests.helpers.counting import CIRCLE

MakeModel = Callable[..., PreTrainedModel]
STEPS = 6


@pytest.fixture
def settings(tmp_path: Path, counting_folder: Path) -> DraftSettings:
    return DraftSettings(
        target=str(counting_folder / "target"),
        out=tmp_path / "draft",
        text=(tmp_path / "notes.txt",),
        own_text=True,
        writing=TextSettings(texts=40, prompt_tokens=6, new_tokens=16, generate_batch=40),
        hidden=32,
        on_policy=2,
        loop=LoopSettings(
            tokens=STEPS * 4 * 22, batch=4, learning_rate=2e-2, bfloat16=False, device="cpu", work=tmp_path / "work"
        ),
    )


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[TargetText], list[dict[str, Any]]]:
    """Texts that drafts write, and what `train` is called with, from now on."""
    texts, parts = list[TargetText](), list[dict[str, Any]]()
    write, train = OnPolicyText.write, on_policy.train

    def writing(self: OnPolicyText, number: int, count: int) -> TargetText:
        texts.append(write(self, number, count))
        return texts[-1]

    def training(model: Any, loss: Any, batches: Any, loop: Any, state: Path, *rest: Any, **options: Any) -> Any:
        outcome = train(model, loss, batches, loop, state, *rest, **options)
        parts.append({"batches": batches, "state": state.name, "steps": outcome.steps})
        return outcome

    monkeypatch.setattr(OnPolicyText, "write", writing)
    monkeypatch.setattr(on_policy, "train", training)
    return texts, parts


def test_a_draft_writes_and_the_target_reads(
    settings: DraftSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts, parts = watched(monkeypatch)
    make_draft(settings)
    assert [part["steps"] for part in parts] == [2, 4, 6]
    assert [part["state"] for part in parts] == ["draft.pt", "draft-on-policy-1.pt", "draft-on-policy-2.pt"]
    assert len(texts) == 2
    assert texts[0].digest != texts[1].digest
    for text in texts:
        assert len(text.ends) == 2 * 2  # half of each batch of four, in two steps
        # The target counts in a circle whatever it reads; a draft that has hardly begun to learn does not.
        written = text.written()
        assert 0.2 < np.isin(written, CIRCLE).mean() < 0.9 or len(set(written.tolist())) > 2 * len(CIRCLE)
        assert np.load(text.folder / "hidden.npy").shape == (int((text.ends - text.prompts).sum()), 64)
    card = (settings.out / "README.md").read_text()
    assert "on-policy distillation in 2 rounds: after each of the first 2 of 3 equal parts" in card
    assert "528 tokens in 6 steps" in card


def test_half_of_each_batch_is_the_drafts_text(settings: DraftSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, parts = watched(monkeypatch)
    make_draft(replace(settings, vocabulary=30))
    assert all(len(set(text.written().tolist())) <= 30 for text in texts)
    batches = [part["batches"] for part in parts]
    assert isinstance(batches[0], PositionBatches)
    seen = []
    for part, first in zip(batches[1:], (2, 4), strict=True):
        assert isinstance(part, MixedBatches)
        rows = [part(step).tolist() for step in (first, first + 1)]
        assert all(sum(row >= 40 for row in batch) == 2 for batch in rows)
        seen.append(sorted(row - 40 for batch in rows for row in batch if row >= 40))
    assert seen == [[0, 1, 2, 3]] * 2  # each of the draft's texts once
    assert len(texts[0].ends) == 4


def test_the_hidden_states_that_a_draft_learns_from_are_those_of_the_target(
    make_model: MakeModel, tmp_path: Path
) -> None:
    target, draft = make_model("llama", layers=2), make_model("llama", spread=0.5)
    none = np.zeros(6, dtype=np.int64)
    rows = [[n, n + 1, n + 2] for n in range(6)]
    side = np.array([TRAINING, JUDGING, TRAINING, TRAINING, JUDGING, TRAINING])
    prompts = Prompts(rows, none, side, ("a",), [], {}, {})
    how = TextSettings(texts=6, prompt_tokens=3, new_tokens=8, temperature=0.0)
    loop = LoopSettings(bfloat16=False, device="cpu", work=tmp_path)
    text = OnPolicyText(draft, target, [prompts], (), how, loop)
    states = text.states(1, 3)
    written = states.text
    begun = {tuple(row[:3]) for row in written.tokens.tolist()}
    assert begun < {tuple(rows[n]) for n in np.flatnonzero(side == TRAINING)}  # three of the four, none held out
    assert len(begun) == 3
    ids = torch.from_numpy(written.tokens.astype(np.int64))
    with torch.no_grad():
        expected = target(ids, output_hidden_states=True).hidden_states[-1][:, 1:-2].flatten(0, 1)
        scores = {model: model(ids[:, :-1]).logits[:, 2:].log_softmax(-1) for model in (draft, target)}
    torch.testing.assert_close(states.hidden(np.arange(len(states))).float(), expected, rtol=2e-3, atol=2e-3)
    likely = {m: float(s.gather(-1, ids[:, 3:, None]).mean()) for m, s in scores.items()}
    assert likely[draft] > likely[target]  # sampled at temperature 1, whatever the target's text was
    assert not torch.equal(scores[draft].argmax(-1), ids[:, 3:])
    assert text.write(1, 3).digest == written.digest
    assert text.write(2, 3).digest != written.digest
    with torch.no_grad():
        output: Any = draft.get_output_embeddings()
        output.weight.add_(0.1)
    assert text.write(1, 3).digest != written.digest


@pytest.mark.parametrize("killed_at", [1, 3, 4])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    settings: DraftSettings, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole = replace(settings, loop=replace(settings.loop, work=settings.loop.work / "whole"))
    make_draft(replace(whole, out=settings.out.with_name("whole")))
    loop = replace(settings.loop, checkpoint_minutes=0.0)
    train, left = on_policy.train, [killed_at]

    def killed(model: Any, loss: Callable[[Any], Any], *rest: Any, **options: Any) -> Any:
        def loss_of(batch: Any) -> Any:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return loss(batch)

        return train(model, loss_of, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(on_policy, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            make_draft(replace(settings, loop=loop))
    texts, parts = watched(monkeypatch)
    kept = {path: path.stat().st_mtime_ns for path in loop.work.glob("text-*/part-*")}
    assert len(kept) == 1 + (killed_at >= 2) + (killed_at >= 4)
    make_draft(replace(settings, loop=loop))
    assert [part["steps"] for part in parts] == [2, 4, 6]
    assert len(texts) == 2
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())  # nothing is written twice
    expected, weights = (load_file(settings.out.with_name(n) / "model.safetensors") for n in ("whole", "draft"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_run_without_rounds_is_not_taken_for_the_first_part(settings: DraftSettings) -> None:
    make_draft(replace(settings, on_policy=0))
    with pytest.raises(RuntimeError, match=r"draft\.pt belongs to a run with other settings or text"):
        make_draft(settings)


def test_the_schedule_of_the_learning_rate_goes_on(settings: DraftSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = list[list[float]]()
    step = torch.optim.AdamW.step

    def stepping(self: torch.optim.AdamW, closure: Any = None) -> Any:
        rates[-1].append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    for rounds in (0, 2):
        rates.append([])
        make_draft(replace(settings, on_policy=rounds, out=settings.out.with_name(f"with-{rounds}")))
    assert rates[0] == rates[1]
    assert len(rates[0]) == STEPS


# Divergences


def test_divergences_are_what_their_names_say() -> None:
    torch.manual_seed(0)
    logits, expected = torch.randn(2, 5, 7, dtype=torch.float64).mul(2)
    q, p = logits.softmax(-1), expected.softmax(-1)
    m = (p + q) / 2

    def kl(first: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (first * (first / other).log()).sum(-1)

    direct = {
        "forward-kl": kl(p, q),
        "reverse-kl": kl(q, p),
        "jensen-shannon": (kl(p, m) + kl(q, m)) / 2,
        "total-variation": 1 - torch.minimum(p, q).sum(-1),
    }
    assert set(direct) == set(DIVERGENCES)
    for name, values in direct.items():
        assert float(DIVERGENCES[name](logits, expected)) == pytest.approx(float(values.mean()), rel=1e-5)


def test_a_draft_learns_by_the_divergence_that_is_asked_for(settings: DraftSettings) -> None:
    few = replace(settings, on_policy=0)
    cards, weights = [], []
    for name in DIVERGENCES:
        out = settings.out.with_name(name)
        make_draft(replace(few, out=out, divergence=name))  # type: ignore[arg-type]
        cards.append((out / "README.md").read_text())
        weights.append(load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"])
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    assert "- loss on training text at the end:" in cards[0]
    assert "- loss (reverse-kl) on training text at the end:" in cards[1]
    assert cards[1].count(" nats a token") == 1
    assert "- loss (total-variation) on training text at the end: 0." in cards[3]
    assert " nats a token" not in cards[3]
    with pytest.raises(RuntimeError, match=r"forward-kl\.pt belongs to a run with other settings"):
        make_draft(replace(few, out=settings.out.with_name("forward-kl"), divergence="reverse-kl"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"on_policy": -1}, "--on-policy must be a whole number of at least 0, got -1"),
        ({"own_text": False}, "--on-policy mixes text of the draft .*: give --own-text"),
        ({"loop": LoopSettings(batch=1, device="cpu")}, "with --on-policy: give a --batch of at least 2"),
        ({"on_policy": STEPS}, "--tokens 528 are 6 steps, and with --on-policy 6 at least 7 are needed"),
        ({"divergence": "forward"}, "--divergence must be one of forward-kl, reverse-kl, .*, got 'forward'"),
    ],
)
def test_rounds_that_cannot_be_are_refused_before_text_is_written(
    settings: DraftSettings, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        make_draft(replace(settings, **changed))
    assert not settings.loop.work.exists()
