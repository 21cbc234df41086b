"""The exported choice of drafts: the learned policy's decisions, and files that are whole or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.numpy import load_file, save_file

from specgym.agents.experiments.control.choice_policy import ChoicePolicy
from specgym.agents.export.choice_rule import ExportedChoiceRule
from specgym.agents.export.stop_rule import ExportedStopRule
from specgym.agents.training.run_folder import RunFileError
from specgym.decoding import CHOICE_FEATURES, FEATURES, MOST_DRAFTS, SLOT_FEATURES
from tests.helpers.sealing import reseal

LOW = np.array([feature.low for feature in CHOICE_FEATURES], np.float32)
HIGH = np.array([feature.high for feature in CHOICE_FEATURES], np.float32)
AVAILABLE = [place for place, feature in enumerate(CHOICE_FEATURES) if feature.name.endswith("available")]


@pytest.fixture
def policy() -> ChoicePolicy:
    """Untrained, but decided: every action comes up."""
    torch.manual_seed(0)
    bound = np.full(MOST_DRAFTS, 32, np.float32)
    space = spaces.Box(np.append(LOW, -bound), np.append(HIGH, bound))
    net_arch = {"pi": [16, 8], "vf": [8]}
    result = ChoicePolicy(space, spaces.Discrete(1 + MOST_DRAFTS), lambda _: 1e-3, net_arch=net_arch)
    with torch.no_grad():
        for parameter in result.scores.parameters():
            parameter.normal_(0, 0.7)
    return result


@pytest.fixture
def seen() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.uniform(LOW, np.minimum(HIGH, 4), (500, len(CHOICE_FEATURES))).astype(np.float32)
    rows[:, AVAILABLE] = rng.random((500, MOST_DRAFTS)) < 0.5
    return rows


def observed(seen: np.ndarray) -> np.ndarray:
    """Observations as the critic has them, with numbers that the policy must not look at."""
    remaining = np.random.default_rng(1).integers(-9, 9, (len(seen), MOST_DRAFTS))
    return np.concatenate([seen, remaining], axis=1).astype(np.float32)


def test_it_decides_as_the_policy_does(policy: ChoicePolicy, seen: np.ndarray) -> None:
    rule = ExportedChoiceRule.of(policy)
    actions, _ = policy.predict(observed(seen), deterministic=True)
    assert rule(seen).tolist() == actions.tolist()
    assert np.bincount(actions, minlength=1 + MOST_DRAFTS).min() > 10
    with torch.no_grad():
        distribution: Any = policy.get_distribution(torch.as_tensor(observed(seen))).distribution
        logits = (distribution.logits[:, 1:] - distribution.logits[:, :1]).numpy()
    there = seen[:, AVAILABLE] > 0
    assert rule.scores(seen)[there] == pytest.approx(logits[there], abs=1e-4)
    assert np.isneginf(rule.scores(seen)[~there]).all()


def test_a_draft_that_cannot_go_on_is_never_drawn(policy: ChoicePolicy, seen: np.ndarray) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        actions = policy(torch.as_tensor(observed(seen)))[0].numpy()
        drafts = np.flatnonzero(actions > 0)
        assert (seen[drafts, np.array(AVAILABLE)[actions[drafts] - 1]] > 0).all()
        assert len(drafts) > 100


def test_drafts_in_another_order_are_chosen_likewise(policy: ChoicePolicy, seen: np.ndarray) -> None:
    rule, order = ExportedChoiceRule.of(policy), np.array([3, 5, 0, 1, 4, 2])
    drafts = seen[:, len(FEATURES) :].reshape(-1, MOST_DRAFTS, len(SLOT_FEATURES))[:, order]
    turned = np.concatenate([seen[:, : len(FEATURES)], drafts.reshape(len(seen), -1)], axis=1)
    assert rule.scores(turned) == pytest.approx(rule.scores(seen)[:, order], abs=1e-4)


def test_one_text_or_many_are_decided_alike(policy: ChoicePolicy, seen: np.ndarray) -> None:
    rule = ExportedChoiceRule.of(policy)
    together = rule(seen)
    assert [int(rule(row[None])[0]) for row in seen] == together.tolist()


def test_saved_and_loaded_it_decides_the_same(policy: ChoicePolicy, seen: np.ndarray, tmp_path: Path) -> None:
    rule = ExportedChoiceRule.of(policy)
    rule.save(tmp_path)
    assert np.array_equal(ExportedChoiceRule.load(tmp_path).scores(seen), rule.scores(seen))
    described = json.loads((tmp_path / "policy.json").read_text())
    assert [feature["name"] for feature in described["features"]] == [feature.name for feature in CHOICE_FEATURES]
    assert described["hidden"] == [16, 8]
    with pytest.raises(RunFileError, match="is not an exported stop rule"):
        ExportedStopRule.load(tmp_path)


def change(name: str, changed: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "policy.safetensors")
        value = changed(weights.pop(name))
        save_file(weights if value is None else {**weights, name: value}, folder / "policy.safetensors")
        reseal(folder / "policy.json")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("score.bias", lambda _: None), r"holds no choice of drafts \(weights that do not match: score.bias\)"),
        (change("slot.weight", lambda weight: weight * np.float32(np.nan)), "a weight is NaN or infinite"),
        (change("slot.weight", lambda weight: weight[:, :9].copy()), "slot and others have shapes"),
        (change("others.weight", lambda weight: weight[:9].copy()), "slot and others have shapes"),
        (change("hidden.0.weight", lambda weight: weight[:, :9].copy()), "hidden.0 has shapes"),
        (change("middle", lambda middle: middle[:9].copy()), "the scaling must be"),
        (
            lambda folder: reseal(folder / "policy.json", features=[{"name": "odd", "low": 0, "high": 2}]),
            "other features",
        ),
        (lambda folder: reseal(folder / "policy.json", hidden=[16]), "does not fit"),
    ],
)
def test_damaged_and_foreign_files_are_refused_by_name(
    policy: ChoicePolicy, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    ExportedChoiceRule.of(policy).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunFileError, match=message) as refused:
        ExportedChoiceRule.load(tmp_path)
    assert "--resume" in str(refused.value)


def test_broken_outputs_verify_and_are_counted(policy: ChoicePolicy, seen: np.ndarray) -> None:
    with torch.no_grad():
        policy.scores.score.bias.fill_(torch.nan)
    rows = observed(seen)[seen[:, AVAILABLE].any(1)][:3]
    actions, _, log_prob = policy(torch.as_tensor(rows))
    assert actions.tolist() == [0, 0, 0]
    assert torch.isnan(log_prob).all()
    assert policy.broken_outputs == 3
