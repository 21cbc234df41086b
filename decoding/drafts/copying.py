"""Drafts that copy from the text so far, and from earlier texts.

*Prompt lookup* proposes what followed the last few tokens the last time they occurred (Saxena, 2023,
https://github.com/apoorvumang/prompt-lookup-decoding). The *suffix* draft counts what followed every run of tokens, and
proposes the commonest token after the longest run that ends the text (Oliaro et al., "SuffixDecoding", arXiv
2411.04975). Both cost next to nothing and pay where the output repeats its input, or itself: summaries, edits, code.

A text that a draft is asked to continue may end in tokens that are drafted and not yet verified. They count as text
while they last, and leave no trace in an index when they are not kept: what is proposed depends on the text alone.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, ClassVar

import torch

from ..errors import whole_number
from ..models.language_model import LanguageModel
from ..sampling import Sampling
from .drafter import Drafter, DraftSession, DraftStep, OneHotStep


class _Copying(ABC):
    """A draft that copies from the text so far, of which the source of a target with an encoder is the beginning."""

    name: str
    vocabulary_size: int
    free: ClassVar[bool] = True

    def beside(self, target: LanguageModel) -> Drafter:
        """Return the draft for a text that a target reads."""
        return _BehindSource(self, target.source) if target.source else self

    @abstractmethod
    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text, and index its prompt."""


class _BehindSource:
    """A draft that copies, for which a source comes before the text."""

    free: ClassVar[bool] = True

    def __init__(self, inner: _Copying, source: Sequence[int]) -> None:
        self.name, self.vocabulary_size = inner.name, inner.vocabulary_size
        self._inner, self._source = inner, source

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        session = self._inner.start([*self._source, *prompt], sampling, generator, device)
        return _SessionBehindSource(session, self._source)


class _SessionBehindSource:
    def __init__(self, session: DraftSession, source: Sequence[int]) -> None:
        self._session, self._source = session, source

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        return self._session.steps([*self._source, *context], count)

    def truncate(self, length: int) -> None:
        self._session.truncate(len(self._source) + length)


class PromptLookupDrafter(_Copying):
    """Proposes the continuation of the most recent earlier occurrence of the text's last tokens.

    Args:
        vocabulary_size: of the target.
        longest: how many last tokens to look for first; shorter matches are tried when that fails.

    Raises:
        ValueError: `longest` is not positive.
    """

    def __init__(self, vocabulary_size: int, longest: int = 3) -> None:
        self.name = "prompt-lookup"
        self.vocabulary_size = whole_number("vocabulary_size", vocabulary_size)
        self.longest = whole_number("longest", longest)

    def digest(self) -> str:
        """Return a SHA-256 over the settings, 64 hex digits."""
        return hashlib.sha256(f"prompt-lookup {self.longest}".encode()).hexdigest()

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text; its index grows as the text does."""
        return _PromptLookupSession(self.longest, prompt)


class _TextSession(ABC):
    """A draft at work on one text that it indexes: what it proposes depends on nothing but the text.

    Tokens beyond those that `truncate` has confirmed may still change, and are then taken out of the index again.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []  # what is indexed
        self._kept = len(prompt)
        self._changes: deque[Any] = deque()  # to the index, by every token that may still change
        for token in prompt:
            self._add(token)
            self._text.append(token)

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        """Propose up to `count` tokens, as far as something matches."""
        text = self._text
        if text[self._kept :] != context[self._kept : len(text)]:
            same = self._kept
            for known, token in zip(text[same:], context[same:], strict=False):
                if known != token:
                    break
                same += 1
            while len(text) > same:
                text.pop()
                self._take_out(self._changes.pop())
        for token in context[len(text) :]:
            self._changes.append(self._add(token))
            text.append(token)
        return self._propose(count)

    def truncate(self, length: int) -> None:
        """Keep the tokens before this position for good."""
        while self._kept < min(length, len(self._text)):
            self._changes.popleft()
            self._kept += 1

    @abstractmethod
    def _add(self, token: int) -> Any:
        """Index a token that follows the text; what changed."""

    @abstractmethod
    def _take_out(self, changes: Any) -> None:
        """Undo the changes of the last token, which is no longer in the text."""

    @abstractmethod
    def _propose(self, count: int) -> Iterator[DraftStep]: ...


class _PromptLookupSession(_TextSession):
    def __init__(self, longest: int, prompt: Sequence[int]) -> None:
        # For each length the position after the latest occurrence of every run of that many tokens.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        super().__init__(prompt)

    def _add(self, token: int) -> list[int]:
        # The run that ends the text is what we look up: it is indexed only once something follows it.
        end = len(self._text)
        before = []
        for length, after in enumerate(self._after[:end], start=1):
            run = tuple(self._text[end - length :])
            before.append(after.get(run, 0))
            after[run] = end
        return before

    def _take_out(self, changes: list[int]) -> None:
        for length, (after, before) in enumerate(zip(self._after, changes, strict=False), start=1):
            run = tuple(self._text[-length:])
            if before:
                after[run] = before
            else:
                del after[run]

    def _propose(self, count: int) -> Iterator[DraftStep]:
        """The tokens that followed the longest match, none where nothing matches."""
        text, longest = self._text, len(self._after)
        for length in range(min(longest, len(text)), 0, -1):
            start = self._after[length - 1].get(tuple(text[-length:]))
            if start is not None:
                return map(OneHotStep, text[start : start + count], repeat(length / longest), repeat(length))
        return iter(())


class SuffixDrafter(_Copying):
    """Proposes the commonest continuation of the longest run of tokens that ends the text and occurred before.

    Of equally common continuations the most recent is proposed, and so token by token, each time after the longest run
    that is known. The confidence is that of a single token: n / (m + 1 / l), where a run of l tokens was followed m
    times, n of them by this token. What was seen once counts as if it had also gone on otherwise, the less so the
    longer the run: l / (l + 1), close to how often it comes true on texts of the shipped targets.

    Indexing a token and proposing another take a few microseconds each, for no more than `longest` + 1 runs, whatever
    the text; the index has as many nodes a token at most, of about 130 bytes. With a `memory` what is proposed depends
    on the texts decoded before, and so does what is drawn for a seed.

    Args:
        vocabulary_size: of the target.
        longest: most tokens of a run.
        memory: tokens of earlier texts that are remembered, at most, without their prompts. When it is full the oldest
            texts are dropped, down to half of it. A text is remembered when the next one is begun, as far as it has
            been read then. 0 remembers none, so that every text begins afresh.

    Raises:
        ValueError: `longest` is not positive, or `memory` negative.
    """

    def __init__(self, vocabulary_size: int, longest: int = 8, memory: int = 0) -> None:
        self.name = "suffix"
        self.vocabulary_size = whole_number("vocabulary_size", vocabulary_size)
        self.longest = whole_number("longest", longest)
        self.memory = whole_number("memory", memory, at_least=0)
        self._texts: deque[list[int]] = deque()
        self._earlier = _SuffixCounts(longest)
        self._latest: _SuffixSession | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the index of earlier texts."""
        return self._earlier.nbytes if self.memory else 0

    def digest(self) -> str:
        """Return a SHA-256 over the settings, 64 hex digits; earlier texts are not in it."""
        return hashlib.sha256(f"suffix {self.longest} {self.memory}".encode()).hexdigest()

    def start(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, device: torch.device
    ) -> DraftSession:
        """Begin a text: index its prompt, and remember the text begun before it."""
        if not self.memory:
            return _SuffixSession(prompt, [_SuffixCounts(self.longest)])
        if self._latest is not None:
            self._remember(self._latest.emitted)
        self._latest = _SuffixSession(prompt, [_SuffixCounts(self.longest), self._earlier])
        return self._latest

    def _remember(self, text: Sequence[int]) -> None:
        kept = list(text[-self.memory :])
        self._texts.append(kept)
        new = [kept]
        if sum(map(len, self._texts)) > self.memory:
            # Sessions at work keep the index that they have.
            self._earlier = _SuffixCounts(self.longest)
            while len(self._texts) > 1 and sum(map(len, self._texts)) > self.memory // 2:
                self._texts.popleft()
            new = list(self._texts)
        for text in new:
            node = 0
            for token in text:
                node, _ = self._earlier.add(node, token)


class _SuffixCounts:
    """Numbers of occurrences of all runs of up to `longest` + 1 tokens: a tree with a node for every run.

    Node 0 is the empty run; a run without its first token is the node's `link`. Work is always with the node of a run
    that ends a text, which goes on by a token.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._children: dict[int, int] = {}  # by node and token in one number, which takes half the time of a tuple
        self._links = [0]
        self._lengths = [0]
        self._tokens = [-1]  # last of the run
        self._counts = [0]
        self._followed = [0]  # occurrences that a token follows
        self._best = [0]  # the run and the token that most often follows it; 0 where none does
        self._columns = (self._links, self._lengths, self._tokens, self._counts, self._followed, self._best)

    @property
    def nbytes(self) -> int:
        """Bytes of the tree: the table of children and its numbers, and six lists."""
        numbers = 2 * sys.getsizeof(1 << 40) * len(self._children)
        return sys.getsizeof(self._children) + numbers + sum(map(sys.getsizeof, self._columns))

    def add(self, node: int, token: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Count a token after the run of a node, and after all runs that end that run.

        Returns:
            The node to go on from, and what `take_out` undoes.
        """
        children, links, counts = self._children, self._links, self._counts
        followed, best = self._followed, self._best
        changes: list[tuple[int, int, int]] = []
        longer = 0
        while True:
            key = node << 32 | token
            child = children.get(key)
            if child is None:
                child = children[key] = len(links)
                links.append(0)
                self._lengths.append(self._lengths[node] + 1)
                self._tokens.append(token)
                counts.append(0)
                followed.append(0)
                best.append(0)
            if longer:
                links[longer] = child
            before = best[node]
            changes.append((node, child, before))
            counts[child] += 1
            followed[node] += 1
            if not before or counts[child] >= counts[before]:
                best[node] = child
            if not node:
                return self._usable(changes[0][1]), changes
            longer = child
            node = links[node]

    def take_out(self, changes: list[tuple[int, int, int]]) -> None:
        """Undo the latest call of `add` that is not undone."""
        for node, child, before in reversed(changes):
            self._counts[child] -= 1
            self._followed[node] -= 1
            self._best[node] = before
            if not self._counts[child]:  # nothing was added since: it is the last node
                del self._children[node << 32 | self._tokens[child]]
                for column in self._columns:
                    column.pop()

    def walk(self, node: int, token: int) -> int:
        """Return the node of the longest run that ends with a token after that of a node, without counting it."""
        while True:
            child = self._children.get(node << 32 | token)
            if child is not None:
                return self._usable(child)
            if not node:
                return 0
            node = self._links[node]

    def known(self, node: int) -> int:
        """Return the node of the longest run that ends that of a node and was followed by anything; 0 for none."""
        while node and not self._best[node]:
            node = self._links[node]
        return node

    def length(self, node: int) -> int:
        """Tokens in the run of a node."""
        return self._lengths[node]

    def step(self, node: int) -> OneHotStep:
        """Return the token that most often followed the run of a node, which must have been followed."""
        best = self._best[node]
        length = self._lengths[node]
        return OneHotStep(self._tokens[best], self._counts[best] / (self._followed[node] + 1 / length), length)

    def _usable(self, node: int) -> int:
        return self._links[node] if self._lengths[node] > self.longest else node


class _SuffixSession(_TextSession):
    """A suffix draft at work on one text, by the counts of the text and those of earlier ones, if any."""

    def __init__(self, prompt: Sequence[int], counts: Sequence[_SuffixCounts]) -> None:
        self._counts = tuple(counts)  # of equally long runs the text's decides
        self._nodes = [0] * len(counts)  # of the text's end
        self._prompt = len(prompt)
        super().__init__(prompt)

    @property
    def emitted(self) -> list[int]:
        """Tokens after the prompt that were kept."""
        return self._text[self._prompt : self._kept]

    def _add(self, token: int) -> tuple[list[int], list[tuple[int, int, int]]]:
        before = self._nodes
        node, changes = self._counts[0].add(before[0], token)
        earlier = zip(self._counts[1:], before[1:], strict=True)
        self._nodes = [node, *(counts.walk(place, token) for counts, place in earlier)]
        return before, changes

    def _take_out(self, changes: tuple[list[int], list[tuple[int, int, int]]]) -> None:
        self._nodes, counted = changes
        self._counts[0].take_out(counted)

    def _propose(self, count: int) -> Iterator[DraftStep]:
        nodes = self._nodes
        for _ in range(count):
            known = [counts.known(node) for counts, node in zip(self._counts, nodes, strict=True)]
            lengths = [counts.length(node) for counts, node in zip(self._counts, known, strict=True)]
            longest = max(lengths)
            if not longest:
                return
            place = lengths.index(longest)
            step = self._counts[place].step(known[place])
            yield step
            nodes = [counts.walk(node, step.token) for counts, node in zip(self._counts, nodes, strict=True)]
