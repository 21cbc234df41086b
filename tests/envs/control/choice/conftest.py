"""Environments that choose between the drafts of a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import pytest

from specgym.envs import DraftChoiceEnv, Workload
from specgym.envs.backends.backend import BackendName
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.drafted_texts import LONGEST, TOKENS
from tests.helpers.made_up_mixed import made_up_costs

Mixed = Callable[[str], tuple[Workload, MixedTrace]]


@pytest.fixture
def make_env(mixed: Mixed) -> Callable[..., DraftChoiceEnv]:
    def make(backend: BackendName, kind: str = "greedy", **changes: Any) -> DraftChoiceEnv:
        workload, trace = mixed(kind)
        arguments: dict[str, Any] = {
            "max_draft_length": LONGEST,
            "max_new_tokens": TOKENS,
            "profile": made_up_costs(trace).with_chances(trace.chances),
            **({"recording": trace} if backend == "replay" else {}),
        }
        env = gymnasium.make("specgym/DraftChoice-v0", workload=workload, backend=backend, **(arguments | changes))
        assert isinstance(env.unwrapped, DraftChoiceEnv)
        return env.unwrapped

    return make
