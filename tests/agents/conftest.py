"""A stand-in for the tuning environments: their spaces and their info, and a reward that is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import ArrayLike

from specgym.decoding import KeepChances, LatencyProfile, bins_of
from specgym.decoding.latency import measure as latency_measure
from specgym.envs.recordings.trace import Trace
from tests.helpers.made_up import trace_info
from tests.helpers.toy_profile import nobodys_profile


@pytest.fixture(scope="module", autouse=True)
def _nobody_measures() -> Iterator[None]:
    """Latency profiles without timing rounds, which takes longest of all in a small run and has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_measure, "measure", nobodys_profile)
        yield


class FakeTuning(gymnasium.Env[np.ndarray, np.ndarray]):
    """Thresholds without models: the reward is highest at fallback 0.6 and rollback 8.

    Args:
        broken: what to spoil at which step (1 is the first after every reset): ``{"obs": {3}, "reward": {5}}``.
    """

    def __init__(self, broken: dict[str, set[int]] | None = None, value: float = np.nan) -> None:
        self.observation_space = spaces.Box(np.array([0.05, 1], np.float32), np.array([0.95, 16], np.float32))
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.broken = broken or {}
        self.value = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        self.knobs = self.np_random.uniform(space.low, space.high).astype(np.float32)
        return self._observation("reset"), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert np.isfinite(action).all()
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        self.steps += 1
        self.knobs = np.clip(self.knobs + action * np.array([0.1, 1.0]), space.low, space.high).astype(np.float32)
        off = np.abs(self.knobs - [0.6, 8.0]) / [0.9, 15.0]
        reward = float(1 - off.sum())
        info: dict[str, Any] = {"workload": "fake", "speedup": 1 + reward, "ms_per_token": 2.0}
        info |= {"knobs/fallback": float(self.knobs[0]), "knobs/rollback": float(self.knobs[1])}
        info |= {"reward/speed": reward}
        if self.steps in self.broken.get("reward", ()):
            reward = self.value
        return self._observation("obs"), reward, False, self.steps == 20, info

    def _observation(self, kind: str) -> np.ndarray:
        observation = self.knobs.copy()
        if self.steps in self.broken.get(kind, ()):
            observation[0] = self.value
        return observation


@pytest.fixture
def fake_tuning() -> Callable[..., FakeTuning]:
    """`FakeTuning`."""
    return FakeTuning


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Text printed since the last call, without line breaks and frames."""
    return lambda: " ".join("".join(capsys.readouterr()).replace("│", " ").split())


@pytest.fixture(scope="session")
def small_workloads(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_noisy: Callable[..., Any]
) -> tuple[str, str]:
    """Names of two workloads on a random pair and a prompt file, which other processes can load too."""
    from specgym.decoding.loading.find_model import load_tokenizer, shipped_models

    folder = tmp_path_factory.mktemp("pair")
    tokenizer = load_tokenizer(shipped_models()[0])
    target = make_model("llama", vocabulary=len(tokenizer))
    for name, model in (("target", target), ("draft", make_noisy(target, 0.3))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = {"train": ["one two", "three four five"], "test": ["six", "seven eight", "nine ten"]}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    name = f"{folder / 'target'}+{folder / 'draft'}/{folder / 'prompts.json'}"
    return name, f"{name}@1.0"


def drafted_trace(
    matches: ArrayLike,
    confidence: ArrayLike,
    *,
    prompts: int = 4,
    temperature: float = 0.0,
    split: str = "train",
    workload: str = "tiny/prose",
) -> Trace:
    """A greedy or sampled trace that nobody recorded, whose texts are all equally long.

    Args:
        matches: which drafted token is right (greedy), or the chance that it is kept, shape (rows, K).
        confidence: of each drafted token, of a shape that fits.
        prompts: among which the rows are divided.
    """
    kept = np.asarray(matches, np.float64)
    rows, longest = kept.shape
    sure = np.broadcast_to(np.asarray(confidence, np.float32), kept.shape)
    tokens = rows // prompts
    info = trace_info(workload=workload, split=split, temperature=temperature, draft_length=longest, tokens=tokens)
    nothing = np.zeros(kept.shape, np.float32)
    return Trace(
        info=info,
        prompt_lengths=np.full(prompts, 3),
        starts=np.arange(prompts + 1) * tokens,
        ended=np.zeros(prompts, np.bool_),
        text=np.zeros(rows, np.int64),
        tokens=np.zeros(kept.shape, np.int64),
        confidence=sure,
        entropy=nothing,
        q=np.ones(kept.shape, np.float32),
        p=kept.astype(np.float32),
        target_entropy=nothing,
        drafted=np.full(rows, longest),
        bins=bins_of(sure),
        match=kept > 0.5,
        distance=nothing,
        jump=np.full((rows, longest + 1), -1),
        chances=KeepChances.assumed(),
        detour_prompts=np.empty(0, np.int64),
        detour_knobs=np.empty((0, 2)),
        detour_rows=np.empty((0, 0), np.int64),
    )


@pytest.fixture(scope="session")
def make_drafted_trace() -> Callable[..., Trace]:
    """`drafted_trace`."""
    return drafted_trace


@pytest.fixture(scope="session")
def telling_trace(make_drafted_trace: Callable[..., Trace]) -> Callable[..., Trace]:
    """Traces whose drafts know themselves: by seed and prompts. A token is right about as often as its confidence."""

    def make(seed: int, prompts: int = 8, tokens: int = 48, **more: Any) -> Trace:
        rng = np.random.default_rng(seed)
        sure = rng.choice([0.05, 0.95], size=(prompts * tokens, 8), p=[0.3, 0.7])
        return make_drafted_trace(rng.random(sure.shape) < sure, sure, prompts=prompts, **more)

    return make


@pytest.fixture
def cheap_drafts() -> LatencyProfile:
    """A drafted token costs a fifth of a plain one."""
    return LatencyProfile("toy", {0: 0.0, 1: 0.002}, {1: 0.010}, 0.010, {"device": "imaginary"})


def transfer_content(name: str) -> dict[str, Any]:
    """A small ``transfer.json`` in which a simpler method wins: after 2 measurements tpe reaches 99 %, learned 97 %."""
    shares = {("learned", 0): 0.95, ("learned", 2): 0.97, ("tpe", 0): 0.8, ("tpe", 2): 0.99}
    summary = [
        {"kind": "pair", "method": method, "measurements": number, "fraction": share, "low": share - 0.01,
         "high": share + 0.005, "within": 0.5}
        for (method, number), share in shares.items()
    ]  # fmt: skip
    results = [
        {"kind": "pair", "left_out": name, "workload": f"{name}/prose", "pair": name, "method": method, "seed": 0,
         "measurements": number, "knobs": {"fallback": 0.5, "rollback": 4}, "reward": share, "best": 1.0,
         "fraction": share, "speedup": 1.5, "divergence": 0.0, "kept": True}
        for (method, number), share in shares.items()
    ]  # fmt: skip
    test = {"kind": "pair", "measurements": 2, "method": "learned", "against": "tpe", "difference": -0.02, "low": -0.03,
            "high": -0.01, "p": 0.01, "p_adjusted": 0.02, "wins": 0.25, "units": 4}  # fmt: skip
    fold = {"kind": "pair", "left_out": name, "workloads": [f"{name}/prose"], "universal": {"fallback": 0.5}}
    return {"format": "specgym-transfer-1", "command": "python evaluate.py", "protocol": {"seeds": [0]},
            "folds": [fold], "results": results, "summary": summary, "tests": [test]}  # fmt: skip


@pytest.fixture
def make_transfer() -> Callable[[str], dict[str, Any]]:
    """`transfer_content`."""
    return transfer_content
