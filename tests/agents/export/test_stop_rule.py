"""The exported stop rule: the learned policy's decisions, and files that are whole or refused by name."""

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

from specgym.agents.experiments.control.stop_policy import StoppingPolicy
from specgym.agents.export.stop_rule import ExportedStopRule
from specgym.agents.training.run_folder import RunFileError
from specgym.decoding.decoders.stop_rules import FEATURES
from tests.helpers.sealing import reseal

LOW = np.array([feature.low for feature in FEATURES], np.float32)
HIGH = np.array([feature.high for feature in FEATURES], np.float32)


@pytest.fixture
def policy() -> StoppingPolicy:
    """Untrained, but decided: both actions come up."""
    torch.manual_seed(0)
    space = spaces.Box(np.append(LOW, np.float32(-32)), np.append(HIGH, np.float32(32)))
    result = StoppingPolicy(space, spaces.Discrete(2), lambda _: 1e-3, net_arch={"pi": [16, 8], "vf": [8]})
    with torch.no_grad():
        for parameter in result.mlp_extractor.policy_net.parameters():
            parameter.normal_(0, 0.7)
        result.action_net.get_parameter("weight").normal_()
    return result


@pytest.fixture
def seen() -> np.ndarray:
    return np.random.default_rng(0).uniform(LOW, np.minimum(HIGH, 4), (500, len(FEATURES))).astype(np.float32)


def test_it_decides_as_the_policy_does(policy: StoppingPolicy, seen: np.ndarray) -> None:
    rule = ExportedStopRule.of(policy)
    messages = np.concatenate([seen, np.random.default_rng(1).integers(-9, 9, (500, 1))], axis=1).astype(np.float32)
    actions, _ = policy.predict(messages, deterministic=True)
    stops = rule(seen)
    assert 50 < stops.sum() < 450
    assert stops.tolist() == actions.astype(bool).tolist()
    with torch.no_grad():
        distribution: Any = policy.get_distribution(torch.as_tensor(messages)).distribution
        logits = distribution.logits
    assert rule.preference(seen) == pytest.approx((logits[:, 1] - logits[:, 0]).numpy(), abs=1e-4)


def test_one_draft_or_many_are_decided_alike(policy: StoppingPolicy, seen: np.ndarray) -> None:
    rule = ExportedStopRule.of(policy)
    together = rule(seen)
    assert [bool(rule(row[None])[0]) for row in seen] == together.tolist()


def test_answers_are_not_overwritten_by_the_next_call(policy: StoppingPolicy, seen: np.ndarray) -> None:
    rule = ExportedStopRule.of(policy)
    first = rule.preference(seen[:10])
    kept = first.copy()
    rule.preference(seen[10:20])
    assert np.array_equal(first, kept)


def test_saved_and_loaded_it_decides_the_same(policy: StoppingPolicy, seen: np.ndarray, tmp_path: Path) -> None:
    rule = ExportedStopRule.of(policy)
    rule.save(tmp_path)
    assert np.array_equal(ExportedStopRule.load(tmp_path).preference(seen), rule.preference(seen))
    described = json.loads((tmp_path / "policy.json").read_text())
    assert [feature["name"] for feature in described["features"]] == [feature.name for feature in FEATURES]
    assert described["hidden"] == [16, 8]


def test_a_rule_that_knows_only_the_first_features_is_read_and_looks_at_no_other(
    policy: StoppingPolicy, seen: np.ndarray, tmp_path: Path
) -> None:
    weights = {name: array.copy() for name, array in ExportedStopRule.of(policy).weights.items()}
    blind = {**weights, "hidden.0.weight": weights["hidden.0.weight"].copy()}
    blind["hidden.0.weight"][:, -3:] = 0
    short = {**weights, "hidden.0.weight": weights["hidden.0.weight"][:, :-3]}
    short |= {name: weights[name][:-3] for name in ("middle", "spread")}
    ExportedStopRule(short).save(tmp_path)
    earlier = ExportedStopRule.load(tmp_path)
    assert len(json.loads((tmp_path / "policy.json").read_text())["features"]) == len(FEATURES) - 3
    assert earlier.preference(seen) == pytest.approx(ExportedStopRule(blind).preference(seen), abs=1e-4)


def truncate(folder: Path) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "policy.safetensors")
    del weights["hidden.1.bias"]
    save_file(weights, folder / "policy.safetensors")
    reseal(folder / "policy.json")


def break_weight(folder: Path) -> None:
    weights = load_file(folder / "policy.safetensors")
    weights["stop.weight"][0, 3] = np.nan
    save_file(weights, folder / "policy.safetensors")
    reseal(folder / "policy.json")


def narrow(folder: Path) -> None:
    weights = load_file(folder / "policy.safetensors")
    weights["hidden.1.weight"] = weights["hidden.1.weight"][:, :9].copy()
    save_file(weights, folder / "policy.safetensors")
    reseal(folder / "policy.json")


def describe(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        reseal(folder / "policy.json", **changes)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "policy.safetensors is damaged"),
        (lambda folder: (folder / "policy.safetensors").unlink(), "No such file.*policy.safetensors"),
        (lambda folder: (folder / "policy.json").unlink(), "there is no .*policy.json"),
        (lambda folder: (folder / "policy.json").write_text("{"), "policy.json cannot be read"),
        (drop_weight, r"holds no stop rule \(weights that do not match: hidden.1.bias\)"),
        (break_weight, "a weight is NaN or infinite"),
        (narrow, "hidden.1 has shapes"),
        (describe(format="specgym-policy-1"), "is not an exported stop rule of this version"),
        (describe(features=[{"name": "temperature", "low": 0, "high": 2}]), "is for other features"),
        (describe(features=7), "policy.json is damaged"),
        (describe(hidden=[16]), "does not fit"),
    ],
)
def test_damaged_and_foreign_files_are_refused_by_name(
    policy: StoppingPolicy, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    ExportedStopRule.of(policy).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunFileError, match=message) as refused:
        ExportedStopRule.load(tmp_path)
    assert "--resume" in str(refused.value)


def test_broken_outputs_go_on_drafting_are_counted_and_reach_the_gradient(policy: StoppingPolicy) -> None:
    low = torch.as_tensor(np.append(LOW, np.float32(0)))[None].repeat(3, 1)
    with torch.no_grad():
        policy.action_net.get_parameter("bias").fill_(torch.nan)
    actions, _, log_prob = policy(low)
    assert actions.tolist() == [0, 0, 0]
    assert torch.isnan(log_prob).all()
    assert policy.broken_outputs == 3
    _, log_prob, _ = policy.evaluate_actions(low, actions)
    assert log_prob is not None
    log_prob.exp().sum().backward()  # as PPO's ratio
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    policy.optimizer.step()
    assert policy.optimizer.skipped == 1  # type: ignore[attr-defined]
    for parameter, kept in zip(policy.parameters(), before, strict=True):
        assert torch.equal(parameter, kept) or torch.isnan(kept).any()
