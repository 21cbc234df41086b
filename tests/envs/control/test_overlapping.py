"""Control of drafts that go on while the target verifies: the rounds and features of the live decoder, and charges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile, PipelinedDecoder, Round, StopRule, traits_of
from specgym.envs import DraftLengthEnv, DraftLengthVectorEnv, PipelinedReplay, Trace, Workload
from tests.helpers.drafted_texts import GO, LONGEST, PLACE, PRODUCT, PROMPTS, STOP, TOKENS
from tests.helpers.inline_drafts import work_in_line

Recorded = Callable[[str], tuple[Workload, Path]]
SHORTER = TOKENS - LONGEST  # so that the recording knows the last token's draft
DRAFT = {tokens: 1e-3 + 2e-3 * tokens for tokens in range(1, 10)}
PROFILE = LatencyProfile(
    "toy", DRAFT, {tokens: 5e-3 + 1e-4 * tokens for tokens in range(1, 12)}, 4e-3, {}, kind="pipelined", overlaps=True
)


class Scripted(StopRule):
    """Stops at random, and keeps what it was shown."""

    name = "scripted"

    def __init__(self, seed: int) -> None:
        self._rng, self.seen = np.random.default_rng(seed), list[NDArray[np.float32]]()

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        self.seen.append(features[0].copy())
        return self._rng.random(1) < 0.35


def overlapping_env(recorded: Recorded, kind: str, pre_verify: int | None, **changes: Any) -> DraftLengthEnv:
    workload, path = recorded(kind)
    options: dict[str, Any] = {
        "recording": path,
        "profile": PROFILE,
        "max_draft_length": LONGEST,
        "max_new_tokens": SHORTER,
    } | changes
    return DraftLengthEnv(workload, "replay", decoder="pipelined", pre_verify=pre_verify, rate=1.3, **options)


def totals(rounds: list[Round]) -> tuple[float, ...]:
    columns = [(len(it.tokens), it.drafted, it.accepted, 1) for it in rounds]
    return (*np.sum(columns, axis=0).tolist(), PROFILE.charge(rounds))


@pytest.mark.parametrize("kind", ["model", "model eos"])
@pytest.mark.parametrize("pre_verify", [1, 0])
def test_the_replay_is_the_live_decoder_with_the_same_rule(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, kind: str, pre_verify: int
) -> None:
    """The rule is asked about the same tokens, sees the same, and makes the same rounds at the same charge."""
    work_in_line(monkeypatch)
    env, pair = overlapping_env(recorded, kind, pre_verify), recorded(kind)[0].load()
    ratio, lengths = PROFILE.marginal_cost(), set()
    for prompt in range(len(PROMPTS.train)):
        for seed in range(2):
            rule = Scripted(seed)
            decoder = PipelinedDecoder(pair, LONGEST, stop=rule, cost_ratio=ratio)
            knobs = {"draft_length": LONGEST, "pre_verify": pre_verify}
            rounds = decoder.generate(PROMPTS.train[prompt], max_new_tokens=SHORTER, knobs=knobs).rounds
            copy = Scripted(seed)
            observation, _ = env.reset(seed=0, options={"prompt": prompt})
            over, done, spent, emitted = False, 0, 0.0, 0
            while not over:
                stop = bool(copy(observation[None])[0])
                observation, reward, over, _, info = env.step(int(stop))
                assert reward == pytest.approx(info["tokens"] - 1.3 * info["seconds"] / 4e-3)
                done, spent, emitted = done + info["rounds"], spent + info["seconds"], emitted + info["tokens"]
                if info["rounds"] and info["ready"] == 0:
                    assert (emitted, spent) == (
                        sum(len(it.tokens) for it in rounds[:done]), pytest.approx(PROFILE.charge(rounds[:done]))
                    )  # fmt: skip
            assert done == len(rounds)
            assert (emitted, info["total_seconds"]) == pytest.approx((totals(rounds)[0], PROFILE.charge(rounds)))
            # The live one is also asked about the first token of a last bet, which nothing depends on.
            assert len(rule.seen) - len(copy.seen) in (0, 1)
            allowed = np.full(11, 0.005)  # a recorded number keeps eight bits
            allowed[PRODUCT] *= LONGEST
            for live, replayed in zip(rule.seen, copy.seen, strict=False):
                assert (abs(replayed - live) <= allowed * abs(live) + 1e-6).all()
            lengths |= {int(seen[PLACE]) for seen in copy.seen}
    assert max(lengths) >= 3


@pytest.mark.parametrize("right", [False, True])
def test_a_fixed_length_is_the_knob(recorded: Recorded, right: bool) -> None:
    """Also where a bet is won on the token that ends a text, and nobody waits for what is drafted behind it."""
    workload, path = recorded("model eos")
    trace, options = Trace.load(path), {"max_draft_length": LONGEST}
    trace = replace(trace, match=np.ones_like(trace.match)) if right else trace
    whole = PipelinedReplay(traits_of("pipelined"), [trace], [workload], [PROFILE], SHORTER, options)
    for length, pre_verify in ((1, 1), (3, 1), (2, 0), (LONGEST, 0)):
        knobs = {"draft_length": np.full(4, float(length)), "pre_verify": np.full(4, float(pre_verify))}
        metrics = whole.decode(np.arange(4), np.zeros(4, int), knobs, np.random.default_rng(0))._asdict()
        env = overlapping_env(recorded, "model eos", pre_verify, recording=trace)
        for prompt in range(4):
            observation, _ = env.reset(seed=0, options={"prompt": prompt})
            over, sums = False, dict.fromkeys(("tokens", "seconds", "drafted", "accepted", "rounds"), 0.0)
            while not over:
                observation, _, over, _, info = env.step(int(observation[PLACE] >= length))
                sums = {name: total + info[name] for name, total in sums.items()}
            assert sums == pytest.approx({name: metrics[name][prompt] for name in sums}, abs=1e-12)


def test_a_drafted_token_costs_what_goes_beyond_the_pass(recorded: Recorded) -> None:
    """Two tokens (5 ms) are hidden by a pass over one (5.1 ms), the third takes 1.9 ms more, and decisions add."""
    for deciding, expected in ((0.0, [0, 1.9e-3]), (2e-4, [0.3e-3, 2.2e-3])):
        # With no argument as the knob's default: the target reads on at once.
        env, prompt = overlapping_env(recorded, "model", None, decision_seconds=deciding), -1
        seen: list[dict[str, Any]] = []
        while len(seen) < 3:
            over, prompt, seen = False, prompt + 1, []
            _, info = env.reset(seed=0, options={"prompt": prompt})
            while not over and len(seen) < 3:
                fresh = info["ready"] == 0 and info["remaining_acceptable"] >= 1
                action = GO if seen or fresh else STOP
                seen = [*seen, info] if seen or fresh else []
                _, _, over, _, info = env.step(action)
                if seen:
                    seen[-1] = info
        assert [it["seconds"] for it in seen[:2]] == pytest.approx(expected)
        assert seen[0]["rounds"] == seen[1]["rounds"] == 0


@pytest.mark.parametrize("kind", ["model", "model eos"])
def test_many_side_by_side_are_what_each_is_alone(recorded: Recorded, kind: str) -> None:
    workload, path = recorded(kind)
    for pre_verify in (1, 0):
        single = overlapping_env(recorded, kind, pre_verify)
        together = DraftLengthVectorEnv(
            8, workload, recording=path, profile=PROFILE, max_draft_length=LONGEST, max_new_tokens=SHORTER,
            decoder="pipelined", pre_verify=pre_verify, rate=1.3,
        )  # fmt: skip
        observed, info = together.reset(seed=0, options={"prompt": np.arange(8) % 4})
        kept = [(observed, np.zeros(8), info)]
        actions = np.random.default_rng(1).integers(0, 2, (400, 8))
        while not together.resting.all():
            observed, rewards, _, _, info = together.step(actions[len(kept) - 1])
            kept.append((observed, rewards, info))
        for text in range(8):
            alone, state = single.reset(seed=0, options={"prompt": text % 4})
            over, reward = False, 0.0
            for number, (observed, rewards, info) in enumerate(kept):
                assert (observed[text] == alone).all()
                assert all(info[name][text] == state[name] for name in ("remaining_acceptable", "ready"))
                assert rewards[text] == pytest.approx(reward)
                if over:
                    break
                alone, reward, over, _, state = single.step(actions[number, text])


def test_what_remains_acceptable_is_what_passes(recorded: Recorded) -> None:
    """Who drafts as far as it says has one token rejected at a time, and who drafts two more has two at some."""
    env = overlapping_env(recorded, "model", 1)
    for beyond, most in ((0, 1), (2, 2)):
        rejected = [0]
        for prompt in range(4):
            _, info = env.reset(seed=0, options={"prompt": prompt})
            over = False
            while not over:
                _, _, over, _, info = env.step(int(info["remaining_acceptable"] + beyond <= 0))
                if not over:  # at the end of a text nobody is asked about some
                    rejected.append(info["drafted"] - info["accepted"])
        assert max(rejected) == most


def test_sampled_texts_are_those_of_the_target_on_average(recorded: Recorded) -> None:
    workload, path = recorded("model sampled")
    lengths = []
    for decoder in (None, "pipelined"):
        profile = None if decoder else LatencyProfile("toy", DRAFT, PROFILE.target_seconds, 4e-3, {})
        env = DraftLengthVectorEnv(
            100, workload, recording=path, profile=profile or PROFILE, max_draft_length=LONGEST,
            max_new_tokens=SHORTER, decoder=decoder,
        )  # fmt: skip
        features, _ = env.reset(seed=0, options={"prompt": np.arange(100) % 4})
        sums = np.zeros(3)
        while not env.resting.all():
            features, _, _, _, info = env.step((features[:, PLACE] >= 1).astype(int))
            sums += [info[name].sum() for name in ("accepted", "drafted", "tokens")]
        lengths.append(sums)
    assert lengths[0][2] == lengths[1][2]
    assert lengths[1][0] / lengths[1][1] == pytest.approx(lengths[0][0] / lengths[0][1], rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder": "pipelined", "backend": "live"}, "cannot be stepped from outside; give backend='replay'"),
        ({"pre_verify": 1}, "pre_verify is for a decoder whose draft goes on while the target verifies"),
        ({"decoder": "speculative", "pre_verify": 0}, "pre_verify is for a decoder whose draft goes on"),
        ({"decoder": "threshold"}, "drafts of threshold are no chains that are verified exactly"),
        ({"decoder": "medusa"}, "drafts of medusa are no chains"),
        ({"decoder": "pipelined", "pre_verify": 2}, "pre_verify must be a whole number from 0 to 1, got 2"),
        ({"decoder": "pipelind"}, "pipelind"),
        ({"decoder": "pipelined", "profile": LatencyProfile("t", DRAFT, {1: 1e-3}, 1e-3, {})}, "made for chain rounds"),
    ],
)
def test_what_cannot_be_is_refused(recorded: Recorded, arguments: dict[str, Any], message: str) -> None:
    workload, path = recorded("model")
    options: dict[str, Any] = {"backend": "replay", "profile": PROFILE, "max_new_tokens": 8, "max_draft_length": 4}
    options |= arguments
    if options["backend"] == "replay":
        options["recording"] = path
    with pytest.raises(ValueError, match=message):
        DraftLengthEnv(workload, **options)
    if "profile" not in arguments:
        with pytest.raises(ValueError, match=message):
            DraftLengthVectorEnv(2, workload, **options)
