"""`train.py --env specgym/RoundKnobs-v0` and `evaluate.py` from the command line to the files, on a random target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from specgym.agents import ExportedKnobRule, ExportedPolicy, KnobPolicy, KnobRange, SettingsError, load_settings
from specgym.agents.command_line import evaluate_command, train_command
from specgym.agents.evaluation.control import round_comparison
from specgym.agents.evaluation.control.round_comparison import (
    LivePrompts,
    best_adaptive,
    recorded_settings,
    round_verdict,
    swept_settings,
)
from specgym.agents.evaluation.control.side_by_side import Decoded
from specgym.agents.evaluation.results import ALL, Row
from specgym.agents.experiments.control.round_knobs_settings import RoundKnobSettings, round_settings
from specgym.agents.training.run_folder import RunFileError
from specgym.decoding import (
    AutoregressiveDecoder,
    FollowAcceptance,
    Knob,
    KnobError,
    LookaheadDecoder,
    Round,
    RoundTracker,
    build_decoder,
    round_features,
)
from specgym.decoding.decoders.lookahead.traits import LookaheadTraits
from specgym.envs import KnobMoves, profile_of, workload
from tests.helpers.sealing import reseal
from tests.helpers.small_runs import target_alone

KNOBS = (Knob("window", 1, 16, 5, True, logarithmic=True), Knob("share", 0, 1, 0.5, step=0.2))
RANGES = [KnobRange("window", 1, 16, 5, 0.4, True, True), KnobRange("share", 0, 1, 0.5, 0.2)]


@pytest.fixture
def options(small_workloads: tuple[str, str], tmp_path: Path) -> list[str]:
    """Options of a run of seconds."""
    chosen = {
        "--runs": tmp_path / "runs", "--name": "mine", "--max-new-tokens": 5, "--environments": 2,
        "--total-timesteps": 32, "--checkpoint-every": 16, "--learning.rollout-steps": 8,
        "--learning.batch-size": 16, "--learning.epochs": 1, "--comparison.passes": 1, "--comparison.levels": 2,
        "--comparison.prompts": 2, "--comparison.training-prompts": 1, "--comparison.resamples": 20,
    }  # fmt: skip
    words = ["--env", "specgym/RoundKnobs-v0", "--decoder", "lookahead", "--seeds", "0", "1"]
    workloads = ["--workloads", target_alone(small_workloads)[1]]
    return [*words, *workloads, *(str(word) for pair in chosen.items() for word in pair)]


def test_a_run_from_its_start_over_a_resume_to_its_evaluation(
    options: list[str], small_workloads: tuple[str, str], tmp_path: Path, shown: Callable[[], str]
) -> None:
    run, workloads = tmp_path / "runs" / "mine", target_alone(small_workloads)[1:]
    assert train_command(options) == 0, shown()
    settings = load_settings(run / "settings.json")
    assert (settings.decoder, settings.workloads) == ("lookahead", workloads)
    assert "knobs=specgym.agents.ExportedKnobRule.load(" in shown()
    table = json.loads((run / "table.json").read_text())
    rows = {(row["workload"], row["method"]): row for row in table["rows"]}
    assert len(rows) == 2 * 5
    assert {method for _, method in rows} == {"plain", "default", "fixed", "adaptive", "learned"}
    assert rows[workloads[0], "plain"]["throughput"] == 1
    assert len(rows[ALL, "learned"]["by_seed"]) == 2
    assert rows[workloads[0], "default"]["rule"] == "(5, 3, 5)"
    assert "tokens a round to" in rows[workloads[0], "adaptive"]["rule"]
    assert "times the throughput of the best fixed setting" in table["verdict"]

    rule = ExportedKnobRule.load(run / "seed-1")
    decoder = LookaheadDecoder(workload(workloads[0]).load())
    text = decoder.generate([5, 6, 7], max_new_tokens=12, knobs=rule)
    assert text.tokens == AutoregressiveDecoder(decoder.pair).generate([5, 6, 7], max_new_tokens=12).tokens

    shutil.rmtree(run / "seed-1")
    for checkpoint in sorted((run / "seed-0" / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(checkpoint)
    (run / "seed-0" / "policy.zip").unlink()
    (run / "table.json").unlink()
    shown()
    assert train_command(["--resume", str(run)]) == 0
    assert "Going on from step 16. Seed 1 (2 of 2): Going on from the beginning" in shown()
    again = json.loads((run / "table.json").read_text())
    learned, before = (
        [row["by_seed"][1] for row in stored["rows"] if row["method"] == "learned"] for stored in (again, table)
    )
    assert learned == before  # seed 1 is learned again, and learns the same

    shown()
    assert evaluate_command([str(run)]) == 0
    assert "All throughputs equal those in" in shown()
    assert evaluate_command([str(run), "--export", "vllm"]) == 2
    assert "vllm takes no policy that chooses knobs round by round" in shown()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--decoder", "threshold"], "threshold decoding is lossy, and only speed is learned here"),
        (["--decoder", "lookahaed"], "no decoder 'lookahaed'"),
        (
            ["--workloads", "tiny/prose", "tiny/code", "tiny/chat"],
            "environments must be at least 3, one",
        ),
        (["--decoder", "speculative"], "SpeculativeDecoder needs a draft"),
        (["--reference-latency", "--refresh-latency"], "give one"),
        (["--workloads", "tiny-3m/prosa"], "Did you mean"),
    ],
)
def test_bad_options_leave_one_message_and_no_folder(
    options: list[str], changed: list[str], message: str, tmp_path: Path, shown: Callable[[], str]
) -> None:
    assert train_command([*options, *changed]) == 2
    assert message in shown()
    assert not (tmp_path / "runs").exists()


def test_workloads_are_the_decoders_own_unless_others_are_named() -> None:
    assert round_settings("lookahead").workloads == LookaheadDecoder.workloads
    assert round_settings("lookahead", ["tiny/prose"]).workloads == ("tiny/prose",)
    assert RoundKnobSettings().option == "--env specgym/RoundKnobs-v0"
    with pytest.raises(SettingsError, match="action must be one of"):
        replace(RoundKnobSettings(), action="jump")  # type: ignore[arg-type]


@pytest.fixture
def policy() -> KnobPolicy:
    torch.manual_seed(1)
    features = round_features(KNOBS)
    low, high = (np.array([getattr(feature, end) for feature in features], np.float32) for end in ("low", "high"))
    result = KnobPolicy(spaces.Box(low, high), spaces.Box(-1, 1, (2,)), lambda _: 1e-3)
    with torch.no_grad():  # as if it had learned something
        result.action_net.get_parameter("weight").mul_(300)
    return result


@pytest.mark.parametrize("action", ["move", "place"])
def test_an_exported_rule_does_as_the_policy_in_its_environment(
    policy: KnobPolicy, tmp_path: Path, action: Any
) -> None:
    ExportedKnobRule.of(policy, RANGES, action).save(tmp_path)
    rule, moves = ExportedKnobRule.load(tmp_path), KnobMoves(KNOBS, scales={"window": 0.4}, action=action)
    text, state, seen = RoundTracker(KNOBS, prompt=9), moves.defaults(), set()
    for number in range(12):
        acted, _ = policy.predict(text.features, deterministic=True)
        state = moves.moved(state, acted)
        values = text.settle(rule, lambda asked: dict(asked or {}))
        assert [*text.values.values()] == pytest.approx(state.tolist(), abs=1e-4)
        assert values == pytest.approx(moves.values(state), abs=1e-4)
        seen.add(values["window"])
        text.saw(Round((0,) * (1 + number * 7 % 5), 4, number * 7 % 5, 0.0, 0.0, 0.0, target_tokens=3 * number + 1))
    assert len(seen) > 1


def test_rules_of_other_knobs_features_or_formats_are_refused(policy: KnobPolicy, tmp_path: Path) -> None:
    rule = ExportedKnobRule.of(policy, RANGES, "move")
    with pytest.raises(KnobError, match="learned for the knobs window, share, and the decoder has share"):
        rule(RoundTracker(KNOBS[1:], 3))
    exported = rule.policy
    other = ExportedPolicy(RANGES, [*exported.state[1:], "age"], exported.std_low, exported.std_high, exported.weights)
    with pytest.raises(ValueError, match=r"the policy sees .*age"):
        ExportedKnobRule(other, "move")
    rule.save(tmp_path)
    with pytest.raises(RunFileError, match="is not an exported policy of this version"):
        ExportedPolicy.load(tmp_path)
    reseal(tmp_path / "policy.json", action="jump")
    with pytest.raises(RunFileError, match="is of no such rule"):
        ExportedKnobRule.load(tmp_path)
    exported.save(tmp_path)
    with pytest.raises(RunFileError, match="is not an exported policy of this version"):
        ExportedKnobRule.load(tmp_path)


def brought(throughput: float) -> Decoded:
    ones = np.ones(2)
    return Decoded(throughput * ones, ones, ones, ones, ones)


@pytest.fixture
def prompts(small_workloads: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> LivePrompts:
    """Prompts that are best decoded with (1, 4, 4), and a little better with fewer guesses where little is accepted."""
    named = workload(target_alone(small_workloads)[0])

    def throughput(knobs: Any) -> float:
        if isinstance(knobs, FollowAcceptance):
            return 3.0 + (knobs.few["guesses"] < knobs.many["guesses"]) + (knobs.high == 4) + knobs.rounds / 100
        values = {"window": 5, "ngram": 3, "guesses": 5, **knobs}
        return 3.0 - 0.1 * abs(values["window"] - 1) - abs(values["ngram"] - 4) - 0.1 * abs(values["guesses"] - 4)

    def decode(self: LivePrompts, several: Any) -> list[Decoded]:
        return [brought(throughput(knobs)) for knobs in several]

    monkeypatch.setattr(LivePrompts, "decode", decode)
    profile: Any = None
    return LivePrompts(build_decoder("lookahead", named.load()), profile, named, [[1]], 8, 1)


def test_simpler_ways_are_the_best_on_their_prompts(prompts: LivePrompts) -> None:
    tried = swept_settings(prompts, 5)
    best = max(tried, key=tried.__getitem__)
    assert best[:2] == (1, 4)
    assert len(tried) < 40
    fixed = dict(zip(("window", "ngram", "guesses"), best, strict=True))
    rule = best_adaptive(prompts, fixed, tried)
    assert rule.few["guesses"] < rule.many["guesses"]
    assert (rule.high, rule.rounds) == (4, 16)
    assert fixed in (rule.few, rule.many)


def test_recorded_settings_are_those_of_the_training_prompts() -> None:
    named = workload("tiny-3m/prose")
    profile = profile_of(named, None, replayed=True, decoder="lookahead")
    shaped: Any = type("Shaped", (LookaheadTraits,), {"resolve_knobs": lambda self, knobs: dict(knobs)})()
    tried = recorded_settings(LivePrompts(shaped, profile, named, [], 64, 1))
    assert len(tried) == 64
    assert max(tried, key=tried.__getitem__)[0] == 1
    assert tried[5, 3, 5] < tried[1, 5, 1] < max(tried.values()) * 1.02
    assert recorded_settings(LivePrompts(shaped, profile, named, [], 10_000, 1)) == {}
    assert recorded_settings(LivePrompts(shaped, profile, workload("smollm2/prose"), [], 8, 1)) == {}


def test_live_prompts_are_charged_with_what_the_rules_decisions_cost(small_workloads: tuple[str, str]) -> None:
    from tests.helpers.toy_profile import nobodys_profile

    named = workload(target_alone(small_workloads)[1])
    decoder = build_decoder("lookahead", named.load())
    profile = nobodys_profile(decoder.pair, decoder)
    setting = {"window": 1, "ngram": 3, "guesses": 2}
    rule = FollowAcceptance(setting, setting)
    prompts = LivePrompts(decoder, profile, named, named.prompt_ids("test")[:2], 8, 2, decision_seconds=0.5)
    fixed, ruled = prompts.decode([setting, rule])
    assert fixed.tokens.shape == (2,)
    assert fixed.tokens.tolist() == ruled.tokens.tolist()
    np.testing.assert_allclose(ruled.seconds, fixed.seconds + 0.5 * fixed.rounds / profile.autoregressive_seconds)
    assert prompts.throughputs([setting]) == [fixed.throughput]
    assert round_comparison.METHODS[0] == "plain"


@pytest.mark.parametrize(
    ("reached", "interval", "words"),
    [
        ((1.5, 1.6, 1.7), (1.05, 1.2), "Knobs that follow the text pay, and learning them does."),
        ((1.5, 1.6, 1.7), (0.95, 1.2), "a fixed setting does as well"),
        ((1.5, 1.8, 1.7), (1.05, 1.2), "The simpler way wins: the adaptive rule"),
        ((1.5, 1.6, 1.55), (0.96, 1.06), "The simpler way does as well: the adaptive rule"),
        ((1.9, 1.8, 1.7), (0.8, 0.95), "The simpler way wins: a fixed setting"),
    ],
)
def test_the_verdict_says_which_way_wins(reached: tuple[float, ...], interval: tuple[float, float], words: str) -> None:
    values = {"learned / fixed": reached[2] / reached[0], "learned / adaptive": reached[2] / reached[1]}
    rows = [
        Row(ALL, method, values={"throughput": value, **values}, intervals={"learned / fixed": interval})
        for method, value in zip(("fixed", "adaptive", "learned"), reached, strict=True)
    ]
    assert words in round_verdict(rows)
