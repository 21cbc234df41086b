"""Environment of draft trees: a draft, its guidance, and its profiles."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from specgym.decoding import Pair, PromptLookupDrafter, Sampling, build_decoder, decoder_names, traits_of
from specgym.decoding.decoders.draft_tree.alignment import AffineAlignment
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder
from specgym.decoding.decoders.draft_tree.predictor import AcceptancePredictor, PredictorShape
from specgym.decoding.latency import probe
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.models.identity import weights_digest
from specgym.envs import TokenPrompts, Workload, profiles, record
from specgym.envs.backends import live as live_backend
from specgym.envs.backends.live import measure_setting
from specgym.envs.profiles import profile_name, profile_of
from specgym.envs.recordings import outcome_recorder as record_outcomes_module
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, record_outcomes
from specgym.envs.recordings.outcomes import Outcomes
from specgym.envs.workloads import default_workload
from tests.helpers.recorded_outcomes import Recorded

HIDDEN = 16


def guided(pair: Pair, weight: float = 0.5, seed: int = 0, **shape: Any) -> DraftTreeDecoder:
    """With a random alignment and a predictor."""
    torch.manual_seed(seed)
    alignment = AffineAlignment(HIDDEN, HIDDEN)
    torch.nn.init.normal_(alignment.bias)
    predictor = AcceptancePredictor(PredictorShape(HIDDEN, **{"width": 8, **shape}))
    return DraftTreeDecoder(pair, alignment=alignment, alignment_weight=weight, predictor=predictor)


def test_a_recorded_setting_is_replayed_prompt_by_prompt_as_it_is_live(
    trees: Recorded,
) -> None:
    live, replayed = trees.live(), trees.single()
    speedups = set()
    for setting in trees.outcomes.settings[:5]:
        knobs = dict(zip(trees.names, setting.tolist(), strict=True))
        for prompt in range(4):
            infos = []
            for env in (live, replayed):
                env.reset(seed=0, options={"knobs": knobs, "prompt": prompt})
                infos.append(env.step(trees.still())[4])
            for name in ("tokens", "rounds", "drafted", "accepted", "seconds", "speedup"):
                assert infos[1][name] == pytest.approx(infos[0][name]), (knobs, prompt, name)
            speedups.add(infos[0]["speedup"])
    assert len(speedups) > 5


def test_levels_and_tokens_read_are_recorded_and_nothing_is_drafted_where_a_knob_forbids_it(
    trees: Recorded,
) -> None:
    outcomes = trees.outcomes
    names = [knob.name for knob in outcomes.info.knobs]
    assert names == [knob.name for knob in DraftTreeDecoder.knobs_without_pair()]
    for number, setting in enumerate(outcomes.settings.tolist()):
        first, last = outcomes.starts[number * 4], outcomes.starts[(number + 1) * 4]
        knobs = dict(zip(names, setting, strict=True))
        drafted, steps = outcomes.drafted[first:last], outcomes.draft_steps[first:last]
        assert drafted.max() <= knobs["node_budget"]
        assert steps.max() <= knobs["max_depth"]
        if not (knobs["node_budget"] and knobs["max_depth"]):
            assert not drafted.any()
            assert not steps.any()
    assert (outcomes.target_tokens == outcomes.drafted + 1).all()
    assert (outcomes.draft_steps < outcomes.drafted).any()
    assert outcomes.accepted.sum() > 0
    assert not outcomes.divergence.any()
    assert outcomes.info.draft_length == 0  # no chain
    assert outcomes.info.draft_sha256


def test_the_command_records_with_the_draft_and_has_no_draft_length(
    trees: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = trees.workload
    monkeypatch.setattr(record, "workload", lambda name: work)
    asked = ["toy/ids", "--decoder", "draft-tree", "--out", str(tmp_path), "--splits", "train", "--settings", "20",
             "--prompts", "1", "--tokens", "4"]  # fmt: skip
    with pytest.raises(TraceError, match="--draft-length: draft-tree drafts no tokens one after another; leave it out"):
        record.main([*asked, "--draft-length", "4"])
    record.main(asked)
    result = Outcomes.load(tmp_path / "toy_ids.draft-tree.train.npz")
    assert isinstance(work.pair, Pair)
    assert work.pair.draft is not None
    assert result.info.draft == work.pair.draft.name
    assert trees.single(recording=result, max_new_tokens=4).reset(seed=0)[1]["workload"] == "toy/ids"


def test_a_recording_names_what_stood_beside_the_draft_and_its_parts_are_not_added_to_with_another(
    trees: Recorded, tree_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = trees.workload
    assert (
        trees.outcomes.info.fingerprint.get("guidance", "") == ""
    )  # as in all recordings that were made before there was any
    few = OutcomeSettings("draft-tree", settings=16, prompts=1, tokens=4)
    decoded, calls = record_outcomes_module._decoded, list[int]()

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decoded(*arguments)

    monkeypatch.setattr(record_outcomes_module, "_decoded", killed)
    monkeypatch.setattr(DraftTreeDecoder, "for_pair", staticmethod(guided))
    with pytest.raises(KeyboardInterrupt):
        record_outcomes(work, "train", tmp_path / "toy.npz", few)
    monkeypatch.setattr(DraftTreeDecoder, "for_pair", staticmethod(partial(guided, seed=1)))
    with pytest.raises(TraceError, match=r"toy\.npz\.parts holds .*\(with other fingerprint\); remove it"):
        record_outcomes(work, "train", tmp_path / "toy.npz", few)
    monkeypatch.setattr(DraftTreeDecoder, "for_pair", staticmethod(guided))
    again = record_outcomes(work, "train", tmp_path / "toy.npz", few)
    assert again.info.fingerprint["guidance"] == guided(tree_pair).guidance.digest() != ""


def test_guidance_is_told_apart_by_all_that_decides_what_is_drafted(tree_pair: Pair) -> None:
    bare = DraftTreeDecoder(tree_pair, alignment=AffineAlignment(HIDDEN, HIDDEN), alignment_weight=0.5)
    calibrated = guided(tree_pair)
    assert calibrated.guidance.predictor is not None
    calibrated.guidance.predictor.temperature.fill_(2.0)
    built = [
        guided(tree_pair),
        guided(tree_pair, weight=0.25),
        guided(tree_pair, seed=1),
        guided(tree_pair, deepest=2),
        bare,
        calibrated,
    ]
    digests = [item.guidance.digest() for item in (*built, DraftTreeDecoder(tree_pair))]
    assert len(set(digests)) == 7
    assert digests[-1] == ""
    assert guided(tree_pair).guidance.digest() == digests[0] != weights_digest(tree_pair.target.model)


@pytest.mark.parametrize(
    ("draft", "message"),
    [(None, "DraftTreeDecoder needs a draft"), (PromptLookupDrafter(64), "needs a model as draft")],
)
def test_a_pair_without_a_draft_model_is_refused(
    trees: Recorded, tree_pair: Pair, draft: PromptLookupDrafter | None, message: str
) -> None:
    work = Workload(Pair(tree_pair.target, draft, name="draftless"), TokenPrompts([[1]], [[2]]))
    with pytest.raises(ValueError, match=message):
        trees.live(workload=work)


def test_the_decoder_is_known_by_name(tree_pair: Pair) -> None:
    decoder, known = build_decoder("draft-tree", tree_pair), traits_of("draft-tree")
    assert type(decoder) is DraftTreeDecoder
    assert decoder.knobs == known.knobs_without_pair()
    assert known.cost_kind(greedy=True) == decoder.cost_kind(greedy=False) == "draft-tree"
    assert known.needs_draft
    assert [name for name in decoder_names() if traits_of(name).drafts_chains()] == [
        "threshold",
        "speculative",
        "pipelined",
    ]
    assert default_workload("draft-tree") == "tiny/prose"


def test_an_action_moves_the_budget_in_doublings_and_the_others_by_a_tenth_of_their_ranges(trees: Recorded) -> None:
    assert trees.single().unwrapped.scales == pytest.approx(  # type: ignore[attr-defined]
        {"max_candidates": 0.7, "max_depth": 0.8, "node_budget": 0.602, "min_acceptance_prob": 0.03}, abs=1e-3
    )


def test_the_profile_is_that_of_trees_by_default_timed_with_the_decoder_itself_and_no_other_is_taken(
    trees: Recorded, tree_pair: Pair, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[DraftTreeDecoder | str | None] = []

    def result(pair: Pair, decoder: DraftTreeDecoder | str | None, *, sampling: Sampling) -> LatencyProfile:
        timed.append(decoder)
        return trees.profile

    monkeypatch.setattr("specgym.decoding.measured", result)
    monkeypatch.setattr(live_backend, "measured", result)
    assert trees.single(workload=trees.workload, profile=None).unwrapped.profile == trees.profile  # type: ignore[attr-defined]
    decoder = guided(tree_pair)
    trees.live(profile=None, decoder=lambda pair: decoder)
    measure_setting(decoder, None, [[1, 2]], 4)
    assert timed == ["draft-tree", decoder, decoder]
    with pytest.raises(LatencyProfileError, match="made for chain rounds, and draft-tree rounds are to be charged"):
        trees.single(profile=profile)


def test_profiles_of_trees_are_named_after_the_pair(trees: Recorded) -> None:
    assert profile_name(trees.workload, "draft-tree") == "toy.draft-tree.greedy.json"
    assert profile_name(Workload("tiny", "prose", Sampling(1.0)), "draft-tree") == "tiny.draft-tree.sampled.json"


def test_the_command_measures_the_pair_with_all_that_belongs_to_it(
    trees: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = trees.workload
    monkeypatch.setattr(profiles, "workload", lambda name: work)
    monkeypatch.setattr(probe, "_contradictions", lambda *_: [])  # however busy the machine is
    profiles.main(["toy/ids", "--decoder", "draft-tree", "--out", str(tmp_path), "--max-target-tokens", "7"])
    (path,) = tmp_path.glob("*.json")
    assert path.name == profile_name(work, "draft-tree")
    result = profile_of(work, path, replayed=True, decoder="draft-tree")
    assert (max(result.draft_seconds), max(result.target_seconds)) == (2, 7)
    assert result.hardware["draft_tree"]["rule"] == "likeliest"
    assert "one more token read adds" in capsys.readouterr().out
