"""What Medusa's rounds are charged by: their kind, how the profile is called, and with which heads it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import pytest

from specgym.decoding import Pair
from specgym.decoding.decoders.medusa import MedusaDecoder, MedusaHeads, TypicalMedusaDecoder, save_heads
from specgym.decoding.files import file_name
from specgym.decoding.latency.measure import measured
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.sampling import Sampling
from specgym.envs import Workload, profiles
from specgym.envs.decoders import DECODERS, build_decoder, default_workload, rounds_of
from specgym.envs.profiles import profile_name, profile_of
from tests.helpers.small_medusa_heads import random_heads


@pytest.mark.parametrize("usual", [0, 2])
def test_live_rounds_are_charged_by_the_decoders_own_heads_whichever_lie_beside_the_target(
    alone: Pair,
    alone_work: Workload,
    cheap_heads: LatencyProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    usual: int,
) -> None:
    monkeypatch.setattr(alone.target, "name", str(tmp_path / "toy"))
    if usual:
        save_heads(random_heads(alone.target.model, usual), tmp_path / "toy-medusa", alone.target)
    heads, timed = random_heads(alone.target.model, 3), list[MedusaHeads | None]()

    def found(pair: Pair, *, sampling: Sampling, rounds: str, heads: MedusaHeads | None, **more: Any) -> LatencyProfile:
        timed.append(heads)
        return cheap_heads

    monkeypatch.setattr(profiles, "measured", found)
    gymnasium.make("specgym/Medusa-v0", workload=alone_work, decoder=lambda pair: MedusaDecoder(pair, heads))
    assert timed == [heads]


def test_a_medusa_decoders_rounds_knobs_and_workload_are_known_by_name(alone: Pair) -> None:
    for name, kind in (("medusa", MedusaDecoder), ("medusa-typical", TypicalMedusaDecoder)):
        decoder = build_decoder(name, alone, 4)
        assert type(decoder) is kind
        assert decoder.knobs == DECODERS[name].knobs(4)
        assert rounds_of(name) == rounds_of(decoder) == rounds_of(kind) == name  # what is judged is timed
        assert not DECODERS[name].drafts
        assert default_workload(name) == "tiny-10m/prose"


def test_typical_acceptance_is_charged_apart_when_sampling_and_as_the_exact_one_when_greedy(
    alone: Pair, alone_work: Workload, cheap_heads: LatencyProfile
) -> None:
    sampled = Workload(alone, alone_work.prompts, Sampling(1.0))
    live = gymnasium.make("specgym/Medusa-v0", workload=alone_work, decoder="medusa-typical", profile=cheap_heads)
    assert live.unwrapped.profile == cheap_heads  # type: ignore[attr-defined]
    with pytest.raises(LatencyProfileError, match="made for medusa rounds, and medusa-typical rounds are to be"):
        gymnasium.make("specgym/Medusa-v0", workload=sampled, decoder="medusa-typical", profile=cheap_heads)
    assert profile_name(alone_work, "medusa-typical") == profile_name(alone_work, "medusa")
    assert profile_name(sampled, "medusa-typical").endswith(".medusa-typical.sampled.json")


def test_profiles_of_medusa_are_named_after_the_target(alone: Pair, alone_work: Workload) -> None:
    assert profile_name(alone_work, "medusa") == f"{file_name(alone.target.name)}.medusa.greedy.json"
    assert profile_name(Workload("tiny", "prose", Sampling(1.0)), "medusa") == "tiny-10m.medusa.sampled.json"


def test_the_command_measures_with_the_heads_beside_the_target(
    alone: Pair,
    alone_work: Workload,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(profiles, "workload", lambda name: alone_work)
    arguments = ["toy/ids", "--rounds", "medusa", "--out", str(tmp_path), "--max-target-tokens", "7"]
    profiles.main(arguments)
    (path,) = tmp_path.glob("*.json")
    assert path.name == profile_name(alone_work, "medusa")
    found = profile_of(alone_work, path, replayed=True, rounds="medusa")
    assert (max(found.draft_seconds), max(found.target_seconds)) == (5, 7)
    assert found.hardware["medusa"]["heads"] == 5
    assert "one more token read adds" in capsys.readouterr().out
    assert measured(alone, rounds="medusa").hardware["medusa"] == found.hardware["medusa"]
