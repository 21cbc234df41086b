"""Choice between drafts: live and replayed decoding are the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from specgym.decoding import CHOICE_FEATURES, FEATURES, SLOT_FEATURES, AutoregressiveDecoder
from specgym.envs import DraftChoiceEnv, Workload
from specgym.envs.backends.live import UNKNOWN
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.drafted_texts import LONGEST, PROMPTS, TOKENS

Mixed = Callable[[str], tuple[Workload, MixedTrace]]
MakeEnv = Callable[..., DraftChoiceEnv]

PRODUCT = [feature.name for feature in FEATURES].index("product")
SLOTS = [feature.name for feature in SLOT_FEATURES]
AHEAD = [SLOTS.index(name) for name in ("available", "next_confidence", "next_matched", "agreement")]
"""Features of a slot that tell what the draft would go on with."""


@pytest.mark.parametrize("kind", ["greedy", "eos"])
def test_greedy_replay_is_live_decoding(make_env: MakeEnv, mixed: Mixed, kind: str) -> None:
    options = {"rate": 1.3, "decision_seconds": 0.0004}
    live, replay = make_env("live", kind, **options), make_env("replay", kind, **options)
    pair, drafts = mixed(kind)[0].load(), len(mixed(kind)[1].drafts)
    allowed = np.full(len(CHOICE_FEATURES), 0.005)  # a recorded number keeps eight bits, and an entropy five
    allowed[PRODUCT] *= LONGEST
    allowed[1] = 0.035
    handed_over = behind_a_wrong_token = 0
    for prompt in range(4):
        text = AutoregressiveDecoder(pair).generate(PROMPTS.train[prompt], max_new_tokens=TOKENS).tokens
        for seed in range(2):
            rng = np.random.default_rng(seed)
            observed, info = live.reset(seed=0, options={"prompt": prompt})
            observed2, info2 = replay.reset(seed=0, options={"prompt": prompt})
            drafted_by: list[int] = []
            emitted, sound, ended = 0, True, False
            while not ended:
                close = abs(observed2 - observed) <= allowed * abs(observed) + 1e-6
                if not sound:  # only the draft that goes on is known behind a token that will be rejected
                    others = [draft for draft in range(drafts) if draft != drafted_by[-1]]
                    slots = close[len(FEATURES) :].reshape(-1, len(SLOTS))
                    slots[np.ix_(others, AHEAD)] = True
                    slots[:, SLOTS.index("agreement")] = True
                assert close.all(), [CHOICE_FEATURES[column].name for column in np.flatnonzero(~close)]
                assert set(info.pop("remaining_acceptable")) == {UNKNOWN}
                assert UNKNOWN not in info2.pop("remaining_acceptable")
                assert info2 == info
                if sound:
                    assert (live.action_masks() == replay.action_masks()).all()
                action = 0 if rng.random() < 0.2 else int(rng.integers(1, 7))
                if not sound and rng.random() < 0.8:
                    action = drafted_by[-1] + 1
                elif not sound:
                    action = 0
                before = len(drafted_by)
                observed, reward, ended, _, info = live.step(action)
                observed2, reward2, ended2, _, info2 = replay.step(action)
                assert (reward2, ended2) == (reward, ended)
                if info["rounds"]:
                    assert info["drafted"] == before
                    emitted += info["tokens"]
                    drafted_by, sound = [], True
                else:
                    drafted_by.append(action - 1)
                    handed_over += len(set(drafted_by)) > 1
                    step = live._choices._session._drafted[-1]  # type: ignore[attr-defined]
                    place = emitted + len(drafted_by) - 1
                    sound = sound and place < len(text) and int(step.token) == text[place]
                    sound = sound and place + 1 < len(text)
                    behind_a_wrong_token += not sound
            assert live._choices._session.tokens == text  # type: ignore[attr-defined]
    assert handed_over > 10
    assert behind_a_wrong_token > 10
