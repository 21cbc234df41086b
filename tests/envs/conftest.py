"""A random pair small enough to decode with in milliseconds, and what an environment on it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder
from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder, TypicalMedusaDecoder
from specgym.decoding.decoders.medusa.files import save_heads
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from specgym.envs import TokenPrompts, Workload
from specgym.envs.backends import live
from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings import trace_recorder
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, record_outcomes
from specgym.envs.recordings.trace import Trace
from specgym.envs.tuning.vector_env import TuningVectorEnv
from tests.helpers.recorded_outcomes import TOKENS, Recorded
from tests.helpers.small_medusa_heads import random_heads

VOCABULARY = 64
DRAFT_LENGTH = 4
PROFILE = LatencyProfile("toy", {0: 0.0, 1: 0.001}, {1: 0.010, 2: 0.011}, 0.010, {"device": "imaginary"})
PROMPTS = TokenPrompts([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], [[11, 12], [13]])

MakeEnv = Callable[..., gymnasium.Env]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[unk]": 0, "knock": 1, "seek": 2, "find": 3} | {f"w{place}": place for place in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's latency profiles."""
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def pair(make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    """A draft that is sometimes right; no tokenizer, and no end-of-text token."""
    target = make_model("llama", layers=1, vocabulary=VOCABULARY, hidden=16, context=128)
    return Pair(target, make_noisy(target, 0.4), name="toy")


@pytest.fixture(scope="session")
def speaking_pair(pair: Pair) -> Pair:
    """Models of the toy pair with a tokenizer of whole words."""
    return Pair(pair.target, pair.draft, word_tokenizer(), name="speaking")


@pytest.fixture
def toy_workload(pair: Pair) -> Workload:
    return Workload(pair, PROMPTS)


def recorded_trace(work: Workload, path: Path, settings: RecordSettings) -> Trace:
    """With detours that take tokens back; those that ship take back the rejected one alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_recorder, "TAKEN_BACK", (1, 4))
        return record(work, "train", path, settings, profile=PROFILE)


@pytest.fixture(scope="session")
def toy_trace(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Trace of `toy_workload` on its training prompts; the first three have detours."""
    settings = RecordSettings(DRAFT_LENGTH, prompts=4, tokens=20, detour_prompts=3, detour_tokens=12)
    return recorded_trace(Workload(pair, PROMPTS), tmp_path_factory.mktemp("toy") / "toy.npz", settings)


@pytest.fixture(scope="session")
def sampled_trace(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Trace of that pair and its prompts, sampled; the first two have detours."""
    settings = RecordSettings(DRAFT_LENGTH, prompts=4, tokens=20, detour_prompts=2, detour_tokens=12)
    work = Workload(pair, PROMPTS, Sampling(1.0))
    return recorded_trace(work, tmp_path_factory.mktemp("sampled") / "toy.npz", settings)


@pytest.fixture
def profile() -> LatencyProfile:
    """Drafting costs 1 ms a token, a pass over one token 10 ms and over each further one 1 ms."""
    return PROFILE


@pytest.fixture
def make_env(toy_workload: Workload, profile: LatencyProfile) -> MakeEnv:
    def make(**changes: Any) -> gymnasium.Env:
        arguments: dict[str, Any] = {
            "workload": toy_workload,
            "profile": profile,
            "max_draft_length": DRAFT_LENGTH,
            "max_new_tokens": 8,
        }
        return gymnasium.make("specgym/Thresholds-v0", **(arguments | changes))

    return make


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Texts decoded by every step of an environment."""
    calls: list[dict[str, Any]] = []
    real = live.generate_texts

    def spy(requests: Any, **others: Any) -> Any:
        for text in requests:
            calls.append(
                {
                    "knobs": text.knobs,
                    "prompt": tuple(text.prompt_ids),
                    "tokens": text.max_new_tokens,
                    "seed": text.seed,
                }
            )
        return real(requests, **others)

    monkeypatch.setattr(live, "generate_texts", spy)
    return calls


@pytest.fixture
def make_vector(toy_trace: Trace, profile: LatencyProfile) -> Callable[..., TuningVectorEnv]:
    """Replayed environments that step together."""

    def make(num_envs: int = 3, **changes: Any) -> TuningVectorEnv:
        usual = {"recording": toy_trace, "profile": profile, "max_draft_length": DRAFT_LENGTH, "max_new_tokens": 8}
        env = gymnasium.make_vec("specgym/Thresholds-v0", num_envs=num_envs, **{**usual, **changes})
        assert isinstance(env, TuningVectorEnv)
        return env

    return make


@pytest.fixture
def make_single(toy_trace: Trace, profile: LatencyProfile) -> MakeEnv:
    """One replayed environment."""

    def make(**changes: Any) -> gymnasium.Env:
        usual = {"recording": toy_trace, "profile": profile, "max_draft_length": DRAFT_LENGTH, "max_new_tokens": 8}
        return gymnasium.make("specgym/Thresholds-v0", backend="replay", **{**usual, **changes})

    return make


@pytest.fixture(scope="session")
def alone(make_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random target with random Medusa heads in the folder beside its own."""
    folder = tmp_path_factory.mktemp("toy")
    pair = Pair(make_model("llama", layers=1, vocabulary=64, hidden=16, context=128), name="toy")
    pair.target.name = str(folder / "toy")
    save_heads(random_heads(pair.target.model, 5, spread=0.2), folder / "toy-medusa", pair.target)
    return pair


@pytest.fixture(scope="session")
def alone_work(alone: Pair) -> Workload:
    """Workload of the target alone."""
    return Workload(alone, PROMPTS)


@pytest.fixture(scope="session")
def cheap_heads() -> LatencyProfile:
    """Medusa heads that cost a twentieth of a pass, and a further token of a pass a hundredth."""
    return LatencyProfile("toy", {0: 0.0, 5: 0.0005}, {1: 0.010, 65: 0.0164}, 0.010, {}, kind="medusa")


@pytest.fixture(scope="session")
def lookahead(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Lookahead decoding, where a further token of a pass costs a twentieth of it."""
    work = Workload(Pair(pair.target, name="toy"), PROMPTS)
    settings = OutcomeSettings("lookahead", settings=12, prompts=4, tokens=TOKENS)
    outcomes = record_outcomes(work, "train", tmp_path_factory.mktemp("lookahead") / "toy.npz", settings)
    cheap = LatencyProfile("toy", {0: 0.0}, {1: 0.010, 2: 0.0105}, 0.010, {}, kind="lookahead")
    middle = {"window": 7.0, "ngram": 3.0, "guesses": 4.0}
    return Recorded("specgym/Lookahead-v0", outcomes, work, cheap, LookaheadDecoder, middle)


@pytest.fixture(scope="session")
def medusa(alone_work: Workload, cheap_heads: LatencyProfile, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Medusa decoding with exact acceptance."""
    settings = OutcomeSettings("medusa", settings=16, prompts=4, tokens=TOKENS)
    outcomes = record_outcomes(alone_work, "train", tmp_path_factory.mktemp("medusa") / "toy.npz", settings)
    middle = {"heads": 3.0, "tree_size": 20.0}
    return Recorded("specgym/Medusa-v0", outcomes, alone_work, cheap_heads, MedusaDecoder, middle)


@pytest.fixture(scope="session")
def typical_medusa(alone: Pair, cheap_heads: LatencyProfile, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Medusa decoding with typical acceptance, of sampled texts, which that changes."""
    work = Workload(alone, PROMPTS, Sampling(1.0))
    settings = OutcomeSettings("medusa-typical", settings=16, prompts=4, tokens=TOKENS)
    outcomes = record_outcomes(work, "train", tmp_path_factory.mktemp("typical") / "toy.npz", settings)
    return Recorded(
        "specgym/Medusa-v0",
        outcomes,
        work,
        replace(cheap_heads, kind="medusa-typical", sampling="sampled"),
        TypicalMedusaDecoder,
        {"heads": 3.0, "tree_size": 20.0, "epsilon": 0.1, "delta": 0.3},
        lossless=False,
        more={"decoder": "medusa-typical"},
    )


@pytest.fixture(scope="session")
def tree_pair(make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    """For trees alone: models that were asked for hidden states, as guidance does, cannot be pickled afterwards."""
    target = make_model("llama", layers=1, vocabulary=VOCABULARY, hidden=16, context=128)
    return Pair(target, make_noisy(target, 0.4), name="toy")


@pytest.fixture(scope="session")
def trees(tree_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Draft trees, a level of which costs a tenth of a pass, and a further token of a pass a hundredth."""
    work = Workload(tree_pair, PROMPTS)
    settings = OutcomeSettings("draft-tree", settings=20, prompts=4, tokens=TOKENS)
    outcomes = record_outcomes(work, "train", tmp_path_factory.mktemp("trees") / "toy.npz", settings)
    cheap = LatencyProfile("toy", {0: 0.0, 8: 0.008}, {1: 0.010, 65: 0.0164}, 0.010, {}, kind="draft-tree")
    middle = {"max_candidates": 3.0, "max_depth": 3.0, "node_budget": 10.0, "min_acceptance_prob": 0.0625}
    return Recorded("specgym/DraftTree-v0", outcomes, work, cheap, DraftTreeDecoder, middle)


@pytest.fixture(params=["lookahead", "medusa", "typical_medusa", "trees"])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    """Each decoder that is replayed by its outcomes."""
    result: Recorded = request.getfixturevalue(request.param)
    return result
