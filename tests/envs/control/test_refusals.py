"""Control of the draft length: bad arguments and actions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import Workload
from specgym.envs.control.env import DraftLengthEnv
from tests.helpers.drafted_texts import GO, LONGEST, STOP, TOKENS, play

Recorded = Callable[[str], tuple[Workload, Path]]
MakeEnv = Callable[..., DraftLengthEnv]


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_a_step_without_a_text_is_refused(make_env: MakeEnv, backend: str) -> None:
    env = make_env(backend)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before the next step"):
        env.step(GO)
    play(env, 0, STOP)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before the next step"):
        env.step(GO)


@pytest.mark.parametrize("action", [2, -1, 0.5, math.nan, None, [0], "go"])
def test_an_action_that_is_none_is_refused(make_env: MakeEnv, action: Any) -> None:
    env = make_env("replay")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action is 0 \(go on\) or 1 \(stop\), got"):
        env.step(action)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knobs": {}}, "unknown reset option 'knobs'; there are: prompt"),
        ({"prompt": 4}, "model/ids has train prompts 0 to 3, got 4"),
        ({"prompt": -1}, "train prompts 0 to 3, got -1"),
        ({"prompt": "words"}, "reset option prompt is an index"),
    ],
)
def test_bad_options_are_refused(make_env: MakeEnv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env("replay").reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "both"}, "backend must be one of 'live', 'replay', got 'both'"),
        ({"split": "dev"}, "split must be one of None, 'train', 'test', got 'dev'"),
        ({"render_mode": "human"}, "render_mode must be one of None, 'rgb_array', got 'human'"),
        ({"max_draft_length": 0}, "max_draft_length must be a whole number from 1 to 32, got 0"),
        ({"max_draft_length": 33}, "from 1 to 32, got 33"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 1, got 1.5"),
        (
            {"rate": -1.0},
            "rate must be a finite number of at least 0, got -1.0; a throughput relative",
        ),
        ({"rate": math.inf}, "rate must be a finite number of at least 0"),
        ({"decision_seconds": math.nan}, "decision_seconds must be a finite number of at least 0, got nan"),
        ({"batch_size": 4}, "has no point at batch size 4"),
        ({"backend": "live"}, "recording is for backend='replay'; the backend is 'live'"),
        ({"max_draft_length": 7}, r"drafts of 6 tokens, and max_draft_length is 7.*--draft-length 7"),
        ({"max_new_tokens": 25}, r"texts of 24 tokens, and max_new_tokens is 25.*--tokens 25"),
        ({"split": "test"}, "has the train prompts of model/ids, not the test prompts"),
        ({"workload": "tiny/prose"}, "recorded from model/ids, and the workload asked for is tiny/prose"),
        ({"recording": None}, "no trace of model/ids .* ships with specgym"),
        ({"recording": "missing.npz"}, "there is no trace .*missing.npz"),
        ({"profile": "missing.json"}, "there is no latency profile missing.json"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    recorded: Recorded, profile: LatencyProfile, arguments: dict[str, Any], message: str
) -> None:
    workload, path = recorded("model")
    usual: dict[str, Any] = {
        "workload": workload,
        "backend": "replay",
        "max_draft_length": LONGEST,
        "max_new_tokens": TOKENS,
        "recording": path,
        "profile": profile,
    }
    with pytest.raises(ValueError, match=message):
        DraftLengthEnv(**(usual | arguments))
