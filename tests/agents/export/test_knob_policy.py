"""The exported policy: the same function as the trained one, and files that are checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from specgym.agents.export.knob_policy import ExportedPolicy, KnobRange
from specgym.agents.export.recommend import Recommendation, load_knobs, recommend, save_knobs, settle
from specgym.agents.policy import KnobPolicy
from specgym.agents.training.run_folder import DESCRIPTION_FILE, WEIGHTS_FILE, RunFileError
from tests.helpers.sealing import reseal

KNOBS = (KnobRange("fallback", 0.05, 0.95, 0.5, 0.2), KnobRange("rollback", 1, 16, 1, 1.5))
WORKLOADS = ("tiny/prose", "tiny/code", "tiny-10m-ngram/code")
STATE = ("fallback", "rollback", *(f"workload/{name}" for name in WORKLOADS))


@pytest.fixture
def policy() -> KnobPolicy:
    torch.manual_seed(0)
    space = spaces.Box(np.array([0.05, 1, 0, 0, 0], np.float32), np.array([0.95, 16, 1, 1, 1], np.float32))
    result = KnobPolicy(space, spaces.Box(-1, 1, (2,)), lambda _: 1e-3, knob_names=("fallback", "rollback"))
    with torch.no_grad():  # as if it had learned something
        result.action_net.get_parameter("weight").mul_(200)
        result.spread_net.get_parameter("weight").mul_(200)
    return result


def test_it_is_the_same_function_after_a_round_trip(policy: KnobPolicy, tmp_path: Path) -> None:
    ExportedPolicy.of(policy, KNOBS, STATE).save(tmp_path)
    exported = ExportedPolicy.load(tmp_path)
    assert exported.knobs == KNOBS
    states = np.array([policy.observation_space.sample() for _ in range(50)])
    theirs = policy.distribution_parameters(torch.tensor(states))
    mean, std = exported.distribution(states)
    for place, name in enumerate(("fallback", "rollback")):
        np.testing.assert_allclose(mean[:, place], theirs[f"{name}_mean"].numpy(), atol=1e-5)
        np.testing.assert_allclose(std[:, place], theirs[f"{name}_std"].numpy(), atol=1e-5)
    np.testing.assert_allclose(exported(states[0]), policy.predict(states[0], deterministic=True)[0], atol=1e-5)


def test_a_step_moves_the_knobs_and_stays_in_their_range(policy: KnobPolicy) -> None:
    exported = ExportedPolicy.of(policy, KNOBS, STATE)
    values = {"fallback": 0.5, "rollback": 4.0}
    moved = exported.step(values, "tiny/code")
    action = exported([0.5, 4.0, 0, 1, 0])
    assert moved["fallback"] == pytest.approx(min(max(0.5 + 0.2 * action[0], 0.05), 0.95))
    assert moved["rollback"] == pytest.approx(min(max(4 + 1.5 * action[1], 1), 16))


def test_recommends_where_the_policy_stays(policy: KnobPolicy, tmp_path: Path) -> None:
    exported = ExportedPolicy.of(policy, KNOBS, STATE)
    weights = {name: np.zeros_like(array) for name, array in exported.weights.items()}
    weights |= {"low": exported.weights["low"], "high": exported.weights["high"]}
    weights["mean.bias"] = np.array([-3.0, 3.0], np.float32)  # always down, always up
    assert settle(ExportedPolicy(KNOBS, STATE, 0.05, 1.0, weights)) == {"fallback": 0.05, "rollback": 16}

    def as_they_are(name: str, rests: Sequence[Mapping[str, float]]) -> Recommendation:
        return Recommendation(None, "too slow") if name == WORKLOADS[-1] else Recommendation(dict(rests[0]))

    result = recommend([exported, exported], WORKLOADS, as_they_are)
    assert list(result["workloads"]) == list(WORKLOADS)
    assert result["workloads"][WORKLOADS[-1]] is None
    assert result["reasons"][WORKLOADS[-1]] == "too slow"
    assert result["rests"][WORKLOADS[0]] == result["by_seed"][WORKLOADS[0]] == [settle(exported, WORKLOADS[0])] * 2
    assert result["by_seed"][WORKLOADS[-1]] == [None, None]
    improved: list[int] = []

    def counted(name: str, rests: Sequence[Mapping[str, float]]) -> Recommendation:
        improved.append(len(rests))
        return Recommendation(None)

    recommend([exported] * 3, WORKLOADS[:1], counted)
    assert sorted(improved) == [1, 1, 1, 3]  # together, and each seed alone
    both = [result["workloads"][name]["rollback"] for name in WORKLOADS[:2]]
    assert result["pairs"]["tiny"]["rollback"] == pytest.approx(sum(both) / 2, abs=1e-4)
    save_knobs(tmp_path / "knobs.json", result)
    assert load_knobs(tmp_path / "knobs.json")["pairs"] == result["pairs"]


def test_a_state_of_the_wrong_length_or_with_nan_is_refused(policy: KnobPolicy) -> None:
    exported = ExportedPolicy.of(policy, KNOBS, STATE)
    for state in ([0.5, 4.0], [float("nan"), 4.0, 0, 0, 0]):
        with pytest.raises(ValueError, match="5 finite entries"):
            exported(state)


def test_damaged_files_are_refused_by_name(policy: KnobPolicy, tmp_path: Path) -> None:
    exported = ExportedPolicy.of(policy, KNOBS, STATE)
    exported.save(tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFileError, match=WEIGHTS_FILE):
        ExportedPolicy.load(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(whole)
    for change, message in (
        ({"format": "other"}, "not an exported policy"),
        ({"state": ["fallback"]}, "do not fit each other"),
        ({"knobs": [{"name": "x"}]}, "do not fit each other"),
    ):
        exported.save(tmp_path)
        reseal(tmp_path / DESCRIPTION_FILE, **change)
        with pytest.raises(RunFileError, match=message):
            ExportedPolicy.load(tmp_path)
    (tmp_path / DESCRIPTION_FILE).unlink()
    with pytest.raises(RunFileError, match="there is no"):
        ExportedPolicy.load(tmp_path)
