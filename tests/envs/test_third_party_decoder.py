"""A decoder from outside the package in the environments of this process, registered by `specgym.register`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import specgym
from specgym.decoding import LatencyProfile, Pair, registry
from specgym.envs import TokenPrompts, Workload, environment_id, is_traced
from specgym.envs.record import main
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, record_outcomes
from specgym.envs.recordings.outcomes import Outcomes
from tests.helpers.outside_package import install

DECODER, ENV = "copy-last", "specgym/CopyLast-v0"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Path of the decoder's class, which nothing has registered yet."""
    entries, specs = dict(registry._registered()), set(gymnasium.registry)
    folder = tmp_path / "package"
    folder.mkdir()
    install(folder)
    for metadata in folder.glob("*.dist-info/entry_points.txt"):
        metadata.unlink()
    monkeypatch.syspath_prepend(str(folder))
    yield "copy_last:CopyLastDecoder"
    sys.modules.pop("copy_last", None)
    registry._entries.clear()
    registry._entries.update(entries)
    for name in set(gymnasium.registry) - specs:
        del gymnasium.registry[name]


@pytest.fixture
def work(pair: Pair) -> Workload:
    return Workload(Pair(pair.target, name="toy"), TokenPrompts([[1, 2, 1, 2, 1], [4, 5, 4]], [[11, 12, 11]]))


@pytest.fixture
def charged() -> LatencyProfile:
    return LatencyProfile("toy", {0: 0.0}, {1: 0.010, 9: 0.014}, 0.010, {}, kind=DECODER)


def test_it_is_registered_recorded_and_replayed(
    path: str, work: Workload, charged: LatencyProfile, tmp_path: Path
) -> None:
    assert specgym.register(path) == DECODER
    assert environment_id(DECODER) == ENV
    assert not is_traced(DECODER)
    live = gymnasium.make(ENV, workload=work, profile=charged, max_new_tokens=8, start="default")
    live.reset(seed=0, options={"prompt": 0})
    settings = OutcomeSettings(DECODER, settings=9, prompts=2, tokens=8)
    outcomes = record_outcomes(work, "train", tmp_path / "toy.npz", settings)
    assert [knob.name for knob in outcomes.info.knobs] == ["copies"]
    options: dict[str, Any] = {"recording": outcomes, "profile": charged, "max_new_tokens": 8, "start": "default"}
    replay = gymnasium.make(ENV, backend="replay", **options)
    replay.reset(seed=0, options={"prompt": 0})
    still = np.zeros(1, np.float32)
    (_, reward, _, _, truth), (_, other, _, _, info) = live.step(still), replay.step(still)
    assert other == pytest.approx(reward)  # greedy, at a recorded setting
    assert info == pytest.approx(truth)
    many = gymnasium.make_vec(ENV, num_envs=3, **options)
    many.reset(seed=0, options={"prompt": 0})
    assert many.step(np.zeros((3, 1), np.float32))[1] == pytest.approx([reward] * 3)


def test_the_command_takes_the_path_of_a_class(
    path: str, work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specgym.envs.record.workload", lambda name: work)
    arguments = ["--decoder", path, "--out", str(tmp_path), "--settings", "2", "--prompts", "1", "--tokens", "4"]
    main(["toy", *arguments, "--splits", "train"])
    assert Outcomes.load(tmp_path / "toy.copy-last.train.npz").info.decoder == DECODER
