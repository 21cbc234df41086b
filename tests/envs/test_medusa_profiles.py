"""Charges of Medusa's rounds: their kind, the profile's name, and the heads it is measured with."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest

from specgym.decoding import Pair, build_decoder, traits_of
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder, TypicalMedusaDecoder
from specgym.decoding.decoders.medusa.files import save_heads
from specgym.decoding.decoders.medusa.heads import MedusaHeads
from specgym.decoding.files import file_name
from specgym.decoding.latency import probe
from specgym.decoding.latency.measure import measured
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.sampling import Sampling
from specgym.envs import Workload, profiles
from specgym.envs.profiles import profile_name, profile_of
from specgym.envs.workloads import default_workload
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

    def result(pair: Pair, decoder: MedusaDecoder, *, sampling: Sampling) -> LatencyProfile:
        timed.append(decoder.heads)
        return cheap_heads

    monkeypatch.setattr("specgym.decoding.measured", result)
    gymnasium.make("specgym/Medusa-v0", workload=alone_work, decoder=lambda pair: MedusaDecoder(pair, heads))
    assert timed == [heads]


def test_a_medusa_decoders_rounds_knobs_and_workload_are_known_by_name(alone: Pair) -> None:
    for name, kind in (("medusa", MedusaDecoder), ("medusa-typical", TypicalMedusaDecoder)):
        decoder = build_decoder(name, alone)
        assert type(decoder) is kind
        assert decoder.knobs == traits_of(name).knobs_without_pair()
        assert traits_of(name).cost_kind(greedy=False) == name  # what is judged is timed
        assert not traits_of(name).needs_draft
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
    monkeypatch.setattr(probe, "_contradictions", lambda *_: [])  # however busy the machine is
    arguments = ["toy/ids", "--decoder", "medusa", "--out", str(tmp_path), "--max-target-tokens", "7"]
    profiles.main(arguments)
    (path,) = tmp_path.glob("*.json")
    assert path.name == profile_name(alone_work, "medusa")
    result = profile_of(alone_work, path, replayed=True, decoder="medusa")
    assert (max(result.draft_seconds), max(result.target_seconds)) == (5, 7)
    assert result.hardware["medusa"]["heads"] == 5
    assert "one more token read adds" in capsys.readouterr().out
    assert measured(alone, "medusa").hardware["medusa"] == result.hardware["medusa"]
