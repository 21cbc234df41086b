"""Prompt lookup and the suffix draft: what they propose, and what may enter their indices."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.drafts.copying import PromptLookupDrafter, SuffixDrafter
from specgym.decoding.drafts.drafter import Drafter, DraftSession, DraftStep
from specgym.decoding.sampling import Sampling

CPU = torch.device("cpu")
KINDS: dict[str, Callable[[int], Drafter]] = {
    "prompt-lookup": lambda vocabulary: PromptLookupDrafter(vocabulary, longest=3),
    "suffix": lambda vocabulary: SuffixDrafter(vocabulary, longest=3),
}


def begin(drafter: Drafter, prompt: Sequence[int]) -> DraftSession:
    return drafter.start(prompt, Sampling(0.0), torch.Generator(), CPU)


def steps(drafter: Drafter, text: list[int], count: int) -> list[DraftStep]:
    return list(begin(drafter, text).steps(text, count))


def drafted(drafter: Drafter, text: list[int], count: int) -> list[int]:
    return [int(step.token) for step in steps(drafter, text, count)]


def random_text(vocabulary: int, length: int, seed: int = 0) -> list[int]:
    return list(torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def test_prompt_lookup_copies_what_followed_the_longest_and_latest_match() -> None:
    drafter = PromptLookupDrafter(100, longest=2)
    assert drafted(drafter, [1, 2, 3, 9, 2, 4, 1, 2], 3) == [3, 9, 2]  # two tokens match before one does
    assert drafted(drafter, [5, 7, 5, 8, 5], 2) == [8, 5]  # of equal matches the latest
    assert drafted(drafter, [1, 2, 3], 4) == []
    assert drafted(drafter, [4, 4], 5) == [4]  # a text that has just begun to repeat
    assert [step.matched for step in steps(drafter, [1, 2, 3, 9, 2, 4, 1, 2], 3)] == [2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_growing_text_is_indexed_as_if_it_had_come_at_once(kind: str) -> None:
    text = random_text(4, 60)
    drafter = KINDS[kind](4)
    growing = begin(drafter, text[:1])
    for length in range(1, len(text) + 1):
        if length % 7 == 0:  # whether it was told of what was kept or not
            growing.truncate(length - 2)
        now = [int(step.token) for step in growing.steps(text[:length], 5)]
        assert now == drafted(drafter, text[:length], 5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_were_drafted_and_not_kept_leave_no_trace(kind: str) -> None:
    text, others = random_text(4, 80), random_text(4, 400, seed=1)
    drafter = KINDS[kind](4)
    disturbed, clean = begin(drafter, text[:5]), begin(drafter, text[:5])
    differed = 0
    for length in range(5, len(text)):
        expected = [int(step.token) for step in clean.steps(text[:length], 5)]
        assert [int(step.token) for step in disturbed.steps(text[:length], 5)] == expected
        # Drafts of others, of which none is kept, come and go within the round.
        for count in range(1, 5):
            tail = others[4 * length : 4 * length + count]
            differed += [int(step.token) for step in disturbed.steps([*text[:length], *tail], 5)] != expected
        for session in (disturbed, clean):
            session.truncate(length)
    assert differed > 100  # but they were matched against while they lasted


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_goes_on_after_the_drafted_tokens_of_others(kind: str) -> None:
    text = [1, 2, 3, 4, 5, 9]
    session = begin(KINDS[kind](10), text)
    assert [int(step.token) for step in session.steps(text, 3)] == []
    assert [int(step.token) for step in session.steps([*text, 2, 3], 2)] == [4, 5]


@pytest.mark.parametrize("kind", [PromptLookupDrafter, SuffixDrafter])
def test_a_match_has_at_least_one_token(kind: Callable[..., Drafter]) -> None:
    with pytest.raises(ValueError, match="longest must be a whole number of at least 1"):
        kind(100, longest=0)


def follower(text: Sequence[int], longest: int) -> tuple[int, int, float] | None:
    """The commonest and of these the latest token after the longest run that ends a text; its run, its confidence."""
    for length in range(min(longest, len(text)), 0, -1):
        run = text[-length:]
        followers = [text[i + length] for i in range(len(text) - length) if text[i : i + length] == run]
        if followers:
            most = max(map(followers.count, followers))
            token = next(token for token in reversed(followers) if followers.count(token) == most)
            return token, length, most / (len(followers) + 1 / length)
    return None


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=60), longest=st.integers(1, 5))
def test_the_suffix_draft_counts_what_followed_the_longest_run(text: list[int], longest: int) -> None:
    drafter = SuffixDrafter(4, longest)
    first = next(iter(steps(drafter, text, 1)), None)
    expected = follower(text, longest)
    assert (first is None) == (expected is None)
    if first is not None and expected is not None:
        token, length, confidence = expected
        assert (first.token, first.matched) == (token, length)
        assert first.confidence() == pytest.approx(confidence)
        assert first.confidence() < 1


def test_a_suffix_draft_follows_its_own_tokens_and_ends_where_nothing_is_known() -> None:
    drafter = SuffixDrafter(10, longest=4)
    text = [1, 2, 3, 4, 9, 1, 2]
    found_again = steps(drafter, text, 8)
    assert [step.token for step in found_again] == [3, 4, 9, 1, 2, 3, 4, 9]
    assert [step.matched for step in found_again] == [2, 3, 4, 4, 4, 2, 3, 4]  # nothing has followed 4, 9, 1, 2
    assert [step.confidence() for step in found_again[:3]] == pytest.approx([2 / 3, 3 / 4, 4 / 5])
    assert drafted(drafter, [1, 2, 3], 8) == []
    assert drafted(drafter, [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1], 1) == [3]
    assert drafted(SuffixDrafter(10, longest=1), [1, 2, 1, 2, 1, 3, 1], 1) == [2]  # the commonest, not the latest


def decode(drafter: Drafter, prompt: Sequence[int], text: Sequence[int]) -> Iterator[list[int]]:
    """Drafts at every position of a text, as rounds of a token would ask for them."""
    session = begin(drafter, prompt)
    for length in range(len(prompt), len(prompt) + len(text) + 1):
        yield [int(step.token) for step in session.steps([*prompt, *text][:length], 3)]
        session.truncate(length)


def test_only_a_suffix_draft_with_a_memory_knows_earlier_texts() -> None:
    text = [11, 12, 13, 14, 15]
    for memory in (0, 100):
        drafter = SuffixDrafter(100, 4, memory)
        assert not any(decode(drafter, [1, 2], text))
        later = list(decode(drafter, [3], text))
        assert later == ([[], [12, 13, 14], [13, 14, 15], [14, 15], [15], []] if memory else [[]] * 6)
        # A prompt is not remembered, and the text at hand decides between equally long runs.
        assert drafted(drafter, [1], 2) == []
        assert drafted(drafter, [12, 7, 12], 1) == [7]


def test_the_oldest_texts_are_forgotten_first_and_the_memory_stays_bounded() -> None:
    drafter = SuffixDrafter(10_000, 4, memory=60)
    sizes = []
    texts = [list(range(100 * number, 100 * number + 20)) for number in range(40)]
    for text in texts:
        for _ in decode(drafter, [9_999], text):
            pass
        sizes.append(drafter.nbytes)
    assert max(sizes[10:]) <= max(sizes[:10])
    begin(drafter, [9_999])
    known = [bool(drafted(drafter, [text[3], text[4]], 1)) for text in texts]
    assert known == sorted(known)
    assert 1 <= sum(known) <= 3


def test_a_text_longer_than_the_memory_is_remembered_by_its_end() -> None:
    drafter = SuffixDrafter(1_000, 4, memory=10)
    for _ in decode(drafter, [999], range(100)):
        pass
    assert drafted(drafter, [95], 2) == [96, 97]
    assert drafted(drafter, [50], 2) == []


class Counted(dict[int, int]):
    """A table that counts how often it is asked."""

    asked = 0

    def get(self, key: int, default: Any = None) -> Any:
        """Ask."""
        self.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize("name", ["the same token", "a period", "few tokens", "many tokens"])
def test_indexing_and_proposing_take_no_more_steps_for_longer_texts(name: str) -> None:
    longest = 6
    text = {
        "the same token": [7] * 3_000,
        "a period": [place % 5 for place in range(3_000)],
        "few tokens": random_text(2, 3_000),
        "many tokens": random_text(3_000, 3_000),
    }[name]
    session: Any = begin(SuffixDrafter(5_000, longest), text[:1])
    counts = session._counts[0]
    counts._children = table = Counted(counts._children)
    for length in range(2, len(text), 97):
        session.truncate(length)
        list(session.steps(text[:length], 0))
        table.asked = 0
        session.truncate(length + 1)
        proposed = list(session.steps(text[: length + 1], 8))
        assert table.asked <= (longest + 1) * (1 + len(proposed))


def test_the_bytes_of_an_index_are_those_that_were_allocated() -> None:
    text = random_text(500, 4_000)
    tracemalloc.start()
    try:
        session: Any = begin(SuffixDrafter(500), text)
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert session._counts[0].nbytes == pytest.approx(allocated, rel=0.15)
    assert allocated < 1_500 * len(text)
