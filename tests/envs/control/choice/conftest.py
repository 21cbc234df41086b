"""Workloads of a target with drafts of every kind, and environments that choose between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
from transformers import PreTrainedModel

from specgym.decoding import (
    AutoregressiveDecoder,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SuffixDrafter,
)
from specgym.envs import DraftChoiceEnv, Workload
from specgym.envs.backends.backend import BackendName
from specgym.envs.recordings.mixed_recorder import RecordSettings, record_mixed
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.drafted_texts import LONGEST, PROMPTS, TOKENS
from tests.helpers.made_up_mixed import made_up_costs

Mixed = Callable[[str], tuple[Workload, MixedTrace]]


@pytest.fixture(scope="session")
def mixed(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
) -> Mixed:
    """Workloads of a random target with five drafts, and what was recorded of them; made when first asked for."""
    known: dict[str, tuple[Workload, MixedTrace]] = {}

    def make(kind: str) -> tuple[Workload, MixedTrace]:
        if kind not in known:
            model = make_model("llama", layers=1, vocabulary=16, hidden=32, context=128, spread=0.6)
            plain = AutoregressiveDecoder(Pair(model))
            texts = [plain.generate(prompt, max_new_tokens=TOKENS).tokens for prompt in PROMPTS.train]
            table = NGramDrafter.fit([text[:9] for text in texts], 16, order=3)
            drafts: list[Any] = [
                make_noisy(model, 0.2), make_noisy(model, 0.35), table, PromptLookupDrafter(16, 2), SuffixDrafter(16, 4)
            ]  # fmt: skip
            pair = Pair(model, drafts, name=f"mixed-{kind}")
            if kind == "eos":
                # What comes late in one text ends some of the others early.
                pair.eos_token_ids = frozenset({next(t for t in texts[0][8:] if t not in texts[0][:8])})
            workload = Workload(pair, PROMPTS, Sampling(1.0 if kind == "sampled" else 0.0))
            path = tmp_path_factory.mktemp("mixed") / "mixed.npz"
            record_mixed(workload, "train", path, RecordSettings(draft_length=LONGEST + 1, tokens=TOKENS))
            known[kind] = workload, MixedTrace.load(path)
        return known[kind]

    return make


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
