"""Replay of a choice between several drafts, against the definition spelt out for a single text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specgym.decoding import BINS, CHOICE_FEATURES, MOST_DRAFTS, ChoiceCharges, KeepChances, MixedProfile
from specgym.envs import DraftChoiceVectorEnv
from specgym.envs.backends.choice_replay import ChoiceReplay, ChoiceTable
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.mixed_trace import MixedTrace
from specgym.envs.recordings.trace import Trace
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed

K, TOKENS = 4, 12
NAMES = [feature.name for feature in CHOICE_FEATURES]


class SpeltOut:
    """One text of a mixed trace, decoded by chains that are kept apart; greedy.

    A free draft proposes its chain of the round, as long as all that was drafted is in it. Nothing is seen of a model
    that takes over.
    """

    def __init__(self, trace: MixedTrace, profile: MixedProfile, prompt: int) -> None:
        self.trace, self.profile = trace, profile
        self.row, self.end = (int(row) for row in trace.first.starts[prompt : prompt + 2])
        asked = TOKENS if trace.first.ended[prompt] else self.end - self.row
        self.asked_end = self.row + asked
        self.read = [self.row - 1] * len(trace.drafts)
        self.acceptance = [0.5] * len(trace.drafts)
        self.hits = [0.5] * len(trace.drafts)
        self.begin()

    def begin(self) -> None:
        """Begin a round."""
        self.chain: list[tuple[int, int, int]] = []  # draft, row and depth of every token
        self.right: list[bool] = []
        self.seen: list[bool] = []

    def token(self, draft: int, row: int, depth: int) -> int:
        """A recorded token."""
        return int(self.trace.traces[draft].tokens[row, depth])

    def pointer(self, draft: int) -> tuple[int, int]:
        """Row and depth of the token that a draft proposes next."""
        if self.trace.free[draft]:
            return self.row, len(self.chain)
        if self.chain and self.chain[-1][0] == draft:
            return self.chain[-1][1], self.chain[-1][2] + 1
        sound = min(self.good, self.end - self.row - 1)
        return self.row + sound, len(self.chain) - sound

    @property
    def good(self) -> int:
        """Tokens that are right before the first that is not."""
        return (*self.right, False).index(False)

    def available(self, draft: int) -> bool:
        """Say whether a draft can propose a token."""
        row, depth = self.pointer(draft)
        trace, place = self.trace.traces[draft], len(self.chain)
        drafted, alone = [self.token(*cell) for cell in self.chain], trace.tokens[self.row, :place].tolist()
        if self.trace.free[draft] and (drafted != alone or not all(self.seen)):
            return False
        return place < min(K, self.asked_end - self.row - 1) and depth < trace.drafted[row]

    def acceptable(self, draft: int) -> int:
        """Return the further tokens of a draft that lengthen what is emitted."""
        place = len(self.chain)
        if self.good < place:
            return self.good - place
        row, depth = self.pointer(draft)
        trace, more = self.trace.traces[draft], 0
        longest = place if self.trace.free[draft] and not self.available(draft) else K  # out of play
        while place + more < longest and depth + more < trace.drafted[row] and trace.match[row, depth + more]:
            more += 1
        return min(more, self.end - self.row - 1 - place)

    def step(self, action: int) -> tuple[int, float, int, int, int]:
        """Do what an action says; return tokens, seconds, drafted, accepted and rounds."""
        draft, place = action - 1, len(self.chain)
        if 0 <= draft < len(self.trace.drafts) and self.available(draft):
            row, depth = self.pointer(draft)
            unread = self.row + place - self.read[draft]
            seconds = self.profile.reading(draft, 1 if self.trace.free[draft] else unread)
            self.read[draft] = self.row + place
            self.right.append(bool(self.trace.traces[draft].match[row, depth]) and place < self.end - self.row)
            goes_on = bool(self.chain) and self.chain[-1][0] == draft
            looked_at = self.trace.free[draft] or place == 0 or goes_on
            self.seen.append(looked_at and all(self.seen))
            self.chain.append((draft, row, depth))
            return 0, seconds, 0, 0, 0
        emitted = min(self.good + 1, self.end - self.row)
        accepted = min(self.good, emitted)
        for number, trace in enumerate(self.trace.traces):
            mine = [place for place, token in enumerate(self.chain) if token[0] == number]
            if mine:
                share = sum(place < accepted for place in mine) / len(mine)
                self.acceptance[number] += 0.2 * (share - self.acceptance[number])
            knew = self.trace.free[number] and trace.drafted[self.row] and self.asked_end - self.row > 1
            began = bool(self.chain) and self.chain[0][0] == number
            if knew or began:
                self.hits[number] += 0.2 * (float(trace.match[self.row, 0]) - self.hits[number])
            self.read[number] = min(self.read[number], self.row + accepted)
        self.row += emitted
        self.begin()
        return emitted, self.profile.target(place + 1), place, accepted, 1

    def observed(self) -> dict[str, float]:
        """Features that can be told from the definition, by name."""
        result: dict[str, float] = {"place": len(self.chain)}
        over = self.row >= self.end
        open_ = [not over and self.available(draft) for draft in range(len(self.trace.drafts))]
        knows = [known and free for known, free in zip(open_, self.trace.free, strict=True)]
        cells = [self.pointer(draft) if known else (0, 0) for draft, known in enumerate(open_)]
        proposed = [int(trace.tokens[cell]) for trace, cell in zip(self.trace.traces, cells, strict=True)]
        for draft, (trace, cell, free) in enumerate(zip(self.trace.traces, cells, self.trace.free, strict=True)):
            others = [proposed[other] for other, known in enumerate(knows) if known and other != draft]
            agreed = sum(token == proposed[draft] for token in others) / len(others) if others else 0.0
            unread = max(self.row + len(self.chain) - self.read[draft], 1)
            chance = chance_of(cell_of(trace, "confidence", cell) if free else None)
            values = {
                "available": open_[draft],
                "free": free,
                "unread": 0 if free else np.log2(unread),
                "next_confidence": trace.confidence[cell] if knows[draft] else 0,
                "next_matched": trace.matched[cell] if knows[draft] else 0,
                "agreement": agreed if knows[draft] else 0,
                "chance": chance if open_[draft] else 0,
                "recent_acceptance": self.acceptance[draft],
                "recent_hits": self.hits[draft],
                "drafting": bool(self.chain) and self.chain[-1][0] == draft,
            }
            result |= {f"draft_{draft + 1}_{name}": float(value) for name, value in values.items()}
        if self.chain:
            draft, row, depth = self.chain[-1]
            trace = self.trace.traces[draft]
            for name in ("confidence", "entropy", "matched", "q"):
                result[name] = cell_of(trace, name, (row, depth)) if self.seen[-1] else 0.0
            result["drawn_probability"] = result.pop("q")
        chances = [
            chance_of(cell_of(self.trace.traces[draft], "confidence", (row, depth)) if seen else None)
            for (draft, row, depth), seen in zip(self.chain, self.seen, strict=True)
        ]
        result["product"] = float(np.prod(chances))
        return result


def cell_of(trace: Trace, name: str, cell: tuple[int, int]) -> float:
    """A recorded number."""
    return float(getattr(trace, name)[cell])


def chance_of(confidence: float | None) -> float:
    """Chance of a token by its confidence, or of any, as long as nothing was counted."""
    usual = KeepChances.assumed()
    if confidence is None:
        return float(usual.average[0])
    confidence = np.floor(np.float32(confidence) * 256 + 0.5) / 256  # as it is read off
    return float(np.interp(confidence, (np.arange(BINS) + 0.5) / BINS, usual.kept[0]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_texts_are_decoded_as_the_definition_says(seed: int) -> None:
    trace = made_up_mixed(prompts=20, tokens=TOKENS, longest=K, seed=seed)
    profile = made_up_costs(trace)
    charges = ChoiceCharges.of(profile, K, TOKENS)
    replay = ChoiceReplay(ChoiceTable([trace], K, TOKENS), [charges], np.zeros(20, np.intp))
    rng = np.random.default_rng(seed)
    everyone = np.arange(20)
    replay.begin(everyone, np.zeros(20, np.int64), everyone, rng)
    texts = [SpeltOut(trace, profile, prompt) for prompt in range(20)]
    handed_over = 0
    for _ in range(200):
        if replay.over.all():
            break
        for number, text in enumerate(texts):
            if replay.over[number]:
                continue
            expected = text.observed()
            seen = {name: replay.features[number, NAMES.index(name)] for name in expected}
            assert seen == pytest.approx(expected, abs=2e-6)
            promised = replay.remaining_acceptable[number].tolist()
            assert promised[: len(trace.drafts)] == [text.acceptable(draft) for draft in range(len(trace.drafts))]
            assert replay.available[number].tolist()[: len(trace.drafts)] == [
                text.available(draft) for draft in range(len(trace.drafts))
            ]
        actions = np.where(rng.random(20) < 0.2, 0, rng.integers(1, 1 + MOST_DRAFTS, 20))
        over = replay.over.copy()
        steps, ended = replay.step(actions, rng)
        for number, text in enumerate(texts):
            expected_steps: Any = (0, 0.0, 0, 0, 0) if over[number] else text.step(int(actions[number]))
            assert tuple(values[number] for values in steps) == pytest.approx(expected_steps)
            assert (number in ended) == (not over[number] and text.row >= text.end)
            handed_over += len({token[0] for token in text.chain}) > 1
    assert replay.over.all()
    assert handed_over > 10


def test_drafts_that_are_missing_in_a_text_stay_so_until_it_ends() -> None:
    trace = made_up_mixed(prompts=6, tokens=TOKENS, longest=K)
    lengths = {"max_draft_length": K, "max_new_tokens": TOKENS}
    options: dict[str, Any] = {"recording": trace, "profile": made_up_costs(trace), **lengths}
    env, whole = DraftChoiceVectorEnv(400, missing_drafts=0.5, **options), DraftChoiceVectorEnv(400, **options)
    env.reset(seed=0)
    whole.reset(seed=0)
    models = np.flatnonzero(~np.array(trace.free)) + 1  # available wherever a draft has room
    there = env.action_masks()[:, models]
    assert 0.05 < 1 - there[:, 0].mean() < 0.3  # half of the texts times 0.3
    assert whole.action_masks()[:, models].all()
    for _ in range(K - 1):
        _, _, ended, _, _ = env.step(np.where(there[:, 1], models[1], models[0]))
        going_on = ~ended & there.any(1)
        assert (env.action_masks()[:, models] <= there)[going_on].all()
    with pytest.raises(ValueError, match=r"missing_drafts must be .* 1"):
        DraftChoiceVectorEnv(missing_drafts=1.5, **options)


def test_a_shorter_recording_is_decoded_beside_a_longer_one_as_it_is_alone() -> None:
    short, long = made_up_mixed("tiny/code", longest=2, tokens=8, seed=3), made_up_mixed(longest=K, tokens=TOKENS)

    def decoded(traces: list[MixedTrace], longest: int, tokens: int) -> list[tuple[int, float, int]]:
        profiles = [made_up_costs(trace) for trace in traces]
        env = DraftChoiceVectorEnv(
            4 * len(traces), recording=traces, profile=profiles, max_draft_length=longest, max_new_tokens=tokens
        )
        _, info = env.reset(seed=0, options={"prompt": np.arange(4).repeat(len(traces))})
        sums = {name: np.zeros(env.num_envs) for name in ("tokens", "seconds", "drafted")}
        while not env.resting.all():
            _, _, _, _, info = env.step(env.action_masks()[:, ::-1].argmax(1) * -1 + MOST_DRAFTS)
            for name, total in sums.items():
                total += info[name]
        return list(zip(*(total[:: len(traces)].tolist() for total in sums.values()), strict=True))

    assert decoded([short, long], K, TOKENS) == decoded([short], 2, 8)
    with pytest.raises(TraceError, match="has drafts of 2 tokens, and max_draft_length is 5"):
        decoded([short, long], K + 1, TOKENS)
    with pytest.raises(TraceError, match="has texts of 8 tokens, and max_new_tokens is 13"):
        decoded([short, long], K, TOKENS + 1)
