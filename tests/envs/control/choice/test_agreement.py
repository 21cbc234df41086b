"""Choice between drafts: live and replayed decoding are the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from specgym.decoding import (
    CHOICE_FEATURES,
    FEATURES,
    MOST_DRAFTS,
    SLOT_FEATURES,
    AutoregressiveDecoder,
    ChoiceRule,
)
from specgym.envs import DraftChoiceEnv, Workload
from specgym.envs.control.live import UNKNOWN
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.drafted_texts import PLACE, PRODUCT, PROMPTS, TOKENS

Mixed = Callable[[str], tuple[Workload, MixedTrace]]
MakeEnv = Callable[..., DraftChoiceEnv]

SLOTS = [feature.name for feature in SLOT_FEATURES]


def differing(live: NDArray[np.float32], replayed: NDArray[np.float32]) -> list[str]:
    """Features that differ by more than rounding: a recorded number keeps eight bits, and an entropy five.

    Chances are read off by confidence, from tables that may be steep.
    """
    allowed = 0.005 * abs(live) + 1e-6
    allowed[1] *= 7
    allowed[PRODUCT] = 0.1
    slots = allowed[len(FEATURES) :].reshape(-1, len(SLOTS))
    slots[:, SLOTS.index("chance")] = 0.08
    return [CHOICE_FEATURES[column].name for column in np.flatnonzero(abs(replayed - live) > allowed)]


@pytest.mark.parametrize("kind", ["greedy", "eos"])
def test_greedy_replay_is_live_decoding(make_env: MakeEnv, mixed: Mixed, kind: str) -> None:
    options = {"rate": 1.3, "decision_seconds": 0.0004}
    live, replay = make_env("live", kind, **options), make_env("replay", kind, **options)
    pair, free = mixed(kind)[0].load(), mixed(kind)[1].free
    handed_over, behind_a_wrong_token, models_behind_one = 0, 0, 0
    for prompt in range(4):
        text = AutoregressiveDecoder(pair).generate(PROMPTS.train[prompt], max_new_tokens=TOKENS).tokens
        for seed in range(4):
            rng = np.random.default_rng(seed)
            observed, info = live.reset(seed=0, options={"prompt": prompt})
            observed2, info2 = replay.reset(seed=0, options={"prompt": prompt})
            drafted_by: list[int] = []
            emitted, sound, ended = 0, True, False
            while not ended:
                assert differing(observed, observed2) == []
                assert (live.action_masks() == replay.action_masks()).all()
                assert set(info.pop("remaining_acceptable")) == {UNKNOWN}
                assert UNKNOWN not in info2.pop("remaining_acceptable")
                assert info2 == info
                action = 0 if rng.random() < 0.15 else int(rng.choice(np.flatnonzero(live.action_masks())))
                before, hands_over = len(drafted_by), bool(drafted_by) and action - 1 not in (-1, drafted_by[-1])
                handed_over += hands_over
                behind_a_wrong_token += hands_over and not sound and free[action - 1]
                models_behind_one += hands_over and not sound and not free[action - 1]
                observed, reward, ended, _, info = live.step(action)
                observed2, reward2, ended2, _, info2 = replay.step(action)
                assert (reward2, ended2) == (reward, ended)
                if info["rounds"]:
                    assert info["drafted"] == before
                    emitted += info["tokens"]
                    drafted_by, sound = [], True
                else:
                    drafted_by.append(action - 1)
                    step = live._choices.sessions[0]._drafted[-1]  # type: ignore[attr-defined]
                    place = emitted + len(drafted_by) - 1
                    sound = sound and place + 1 < len(text) and int(step.token) == text[place]
            assert live._choices.sessions[0].tokens == text  # type: ignore[attr-defined]
    assert handed_over > 40
    assert behind_a_wrong_token > 0
    assert models_behind_one > 10


class Peeking(ChoiceRule):
    """Chooses by what can be seen of drafts in the middle of a round, and would gain by more than that."""

    name = "peeking"

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Go on while a free draft knows the next token, with the one that matches most; else with a model, twice."""
        slots = features[:, len(FEATURES) :].reshape(len(features), MOST_DRAFTS, len(SLOTS))
        column = {name: slots[:, :, SLOTS.index(name)] for name in SLOTS}
        able = column["available"] > 0
        worth = column["free"] * (1 + column["next_matched"] + column["agreement"]) * able
        model = (able & (column["free"] == 0)).argmax(1)
        place = features[:, PLACE]
        return np.where(worth.max(1) > 0, worth.argmax(1) + 1, np.where(place < 2, model + 1, 0)).astype(np.int64)


@pytest.mark.parametrize("kind", ["greedy", "eos"])
def test_who_looks_at_other_drafts_gains_as_much_live_as_by_replay(make_env: MakeEnv, kind: str) -> None:
    """A recording knows which tokens are wrong; what it shows behind one must not say so."""
    reached = []
    for backend in ("live", "replay"):
        env, texts = make_env(backend, kind), []
        for prompt in range(len(PROMPTS.train)):
            features, _ = env.reset(seed=0, options={"prompt": prompt})
            ended = False
            while not ended:
                features, _, ended, _, info = env.step(int(Peeking()(features[None])[0]))
            texts.append((info["total_tokens"], info["total_seconds"]))
        reached.append(texts)
    assert reached[0] == reached[1]
