"""Workloads with every kind of draft, or several, and environments that control the length of drafts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from transformers import PreTrainedModel

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.drafts.copying import PromptLookupDrafter, SuffixDrafter
from specgym.decoding.drafts.drafter import Drafter
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from specgym.envs import Workload
from specgym.envs.control.env import DraftLengthEnv
from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings import mixed_recorder
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.drafted_texts import LONGEST, PROMPTS, TOKENS

Recorded = Callable[[str], tuple[Workload, Path]]
Mixed = Callable[[str], tuple[Workload, MixedTrace]]


@pytest.fixture(scope="session")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
) -> Recorded:
    """Workloads of a random target with each kind of draft, and their traces; made when first asked for."""
    known: dict[str, tuple[Workload, Path]] = {}

    def make(kind: str) -> tuple[Workload, Path]:
        if kind not in known:
            draft_kind, _, option = kind.partition(" ")
            model = make_model("llama", layers=1, vocabulary=16, hidden=32, context=128, spread=0.6)
            plain = AutoregressiveDecoder(Pair(model))
            texts = [plain.generate(prompt, max_new_tokens=TOKENS).tokens for prompt in PROMPTS.train]
            draft: PreTrainedModel | Drafter
            if draft_kind == "model":
                draft = make_noisy(model, 0.3)
            elif draft_kind == "ngram":
                draft = NGramDrafter.fit([text[:9] for text in texts], 16, order=3)
            else:
                draft = PromptLookupDrafter(16, longest=2)
            pair = Pair(model, draft, name=kind.replace(" ", "-"))
            if option == "eos":
                # What comes late in one text ends some of the others early.
                pair.eos_token_ids = frozenset({next(t for t in texts[0][8:] if t not in texts[0][:8])})
            sampling = Sampling(1.0) if option == "sampled" else Sampling(0.0)
            workload = Workload(pair, PROMPTS, sampling)
            path = tmp_path_factory.mktemp("traces") / f"{kind}.npz"
            settings = RecordSettings(draft_length=LONGEST + 1, tokens=TOKENS, detour_prompts=0)
            record(workload, "train", path, settings)
            known[kind] = workload, path
        return known[kind]

    return make


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
            mixed_recorder.record_mixed(
                workload, "train", path, mixed_recorder.RecordSettings(draft_length=LONGEST + 1, tokens=TOKENS)
            )
            known[kind] = workload, MixedTrace.load(path)
        return known[kind]

    return make


@pytest.fixture
def make_env(recorded: Recorded, profile: LatencyProfile) -> Callable[..., DraftLengthEnv]:
    def make(backend: str, kind: str = "model", **changes: Any) -> DraftLengthEnv:
        workload, path = recorded(kind)
        arguments: dict[str, Any] = {"max_draft_length": LONGEST, "max_new_tokens": TOKENS, "profile": profile}
        if backend == "replay":
            arguments["recording"] = path
        env = gymnasium.make("specgym/DraftLength-v0", workload=workload, backend=backend, **(arguments | changes))
        assert isinstance(env.unwrapped, DraftLengthEnv)
        return env.unwrapped

    return make
