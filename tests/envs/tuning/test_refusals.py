"""Tuning: bad actions, options and arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.envs import TuningEnv, Workload

MakeEnv = Callable[..., gymnasium.Env]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knob": {}}, "unknown reset option 'knob'; there are: knobs, prompt"),
        ({"knobs": {"speed": 1}}, "there is no knob 'speed'; the decoder has: fallback, rollback"),
        ({"knobs": {"fallback": 1.01}}, "fallback must be between 0 and 1, got 1.01"),
        ({"knobs": {"rollback": math.nan}}, "rollback must be between 1 and 4, got nan"),
        ({"knobs": {"rollback": "two"}}, "rollback must be between 1 and 4, got 'two'"),
        ({"knobs": [0.5]}, "must map names to values"),
        ({"prompt": 4}, "train prompts 0 to 3"),
        ({"prompt": -1}, "train prompts 0 to 3"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [64]}, "vocabulary of 64"),
        ({"prompt": list(range(64)) * 2}, "leaves no room to generate"),
        ({"prompt": "words"}, "pair toy has no tokenizer"),
        ({"prompt": 1.5}, r"reset option prompt \(an index, token ids or a string\)"),
    ],
)
def test_bad_options_are_refused(make_env: MakeEnv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env().reset(seed=0, options=options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_action_that_is_not_finite_is_refused_by_knob(make_env: MakeEnv, bad: float) -> None:
    env = make_env().unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"the action for knob rollback is -?(nan|inf); actions must be finite"):
        env.step(np.array([0.0, bad], np.float32))


def test_an_action_of_another_shape_is_refused(make_env: MakeEnv) -> None:
    env = make_env().unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action has shape \(2,\), one number a knob, got \(3,\)"):
        env.step(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "recorded"}, "backend must be one of 'live', 'replay', got 'recorded'"),
        ({"recording": "some.npz"}, "a recording is for backend='replay'"),
        ({"batch_size": 8}, "covers batch size 1"),
        ({"timing": "cpu"}, "timing must be one of 'profile', 'wall', got 'cpu'"),
        ({"start": "best"}, "start must be one of 'random', 'default', got 'best'"),
        ({"split": "dev"}, "split must be one of 'train', 'test', got 'dev'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"decoder": "beam"}, "no decoder 'beam'; there are: threshold, speculative"),
        ({"decoder": AutoregressiveDecoder}, "AutoregressiveDecoder has no knobs"),
        ({"max_draft_length": 0}, "max_draft_length must be a whole number of at least 1"),
        ({"ranges": {"fallback": (0.5, 1.5)}}, "ranges: fallback must go from low to high within 0 and 1"),
        ({"ranges": {"fallback": (0.5, 0.5)}}, "ranges: fallback must go from low to high"),
        ({"ranges": {"speed": (0, 1)}}, "ranges: there is no knob 'speed'"),
        ({"scales": {"rollback": 0.0}}, "scales: rollback must be positive and finite"),
        ({"scales": {"rollback": math.inf}}, "scales: rollback must be positive and finite"),
        ({"scales": {"speed": 1.0}}, "scales: there is no knob 'speed'"),
        ({"profile": "nowhere.json"}, "there is no latency profile nowhere.json"),
        ({"workload": "tiny/prosa"}, "Did you mean 'prose'"),
        ({"reward": {"falloff": 0.0}}, "falloff must be a finite number above 0"),
    ],
)
def test_bad_arguments_are_refused(make_env: MakeEnv, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(**arguments)


def test_an_unknown_render_mode_is_refused(toy_workload: Workload) -> None:
    mode: Any = "video"
    with pytest.raises(ValueError, match="render_mode must be one of None, 'ansi', 'human', got 'video'"):
        TuningEnv(workload=toy_workload, render_mode=mode)
