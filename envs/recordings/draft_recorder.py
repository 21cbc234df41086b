"""Recording: what drafts would have done at every position of a text, and what the target would have said of it.

All positions of a stretch of text go through each model together, as the branches of one token tree: at every position
hangs the chain that the draft proposes there. The draft grows the chains by one token a pass; the target reads them all
in one, those of several drafts together, and what they have in common once. A model that reads chains alone is asked at
one position after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgym.decoding import (
    Drafter,
    DraftStep,
    EagleDrafter,
    LanguageModel,
    ModelDrafter,
    NumericalError,
    Pair,
    PromptError,
    Sampling,
    TextRules,
    TokenTree,
    beside,
    bins_of,
    draft_models,
    drafts_of,
    draw,
    likeliest_of_ten,
    sampling_of,
    total_variation,
)

STRETCH = 32
"""Positions recorded in one pass. With more, attention over the other positions' branches costs more than it saves."""

Rows = dict[str, NDArray[np.generic]]
_Places = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""By level the nodes before its tokens in a `_Comb`, and those of its tokens."""


@dataclass(frozen=True)
class Level:
    """The tokens that the chains of a stretch have at one depth.

    Attributes:
        rows: which positions' chains reach this depth, shape (rows,), int64, ascending.
        tokens: shape (rows,), int64.
        distribution: what each was chosen from, as the draft sees it (at temperature 1 when greedy), shape (rows,
            vocabulary); None for a one-hot draft.
        confidence: shape (rows,).
        top_ten: see `Trace`, shape (rows,); for a one-hot draft the confidence.
        matched: tokens of context that decided, up to 255, shape (rows,), uint8; 0 for a model.
    """

    rows: Tensor
    tokens: Tensor
    distribution: Tensor | None
    confidence: Tensor
    top_ten: Tensor
    matched: Tensor


class Recorder:
    """Records what a pair does at every position of given texts.

    Args:
        pair: a target with a draft, or several.
        sampling: how all choose tokens.
        draft_length: K, the most tokens drafted at a position.
    """

    def __init__(self, pair: Pair, sampling: Sampling, draft_length: int) -> None:
        self.pair = pair
        self.sampling = sampling_of(pair, sampling)
        self.draft_length = draft_length

    def record(self, prompt: Sequence[int], text: Sequence[int], seed: int) -> Rows:
        """Return the rows of a pair's only draft, as `record_each` does of all."""
        (rows,) = self.record_each(prompt, text, seed)
        return rows

    @torch.inference_mode()
    def record_each(self, prompt: Sequence[int], text: Sequence[int], seed: int) -> list[Rows]:
        """One row for each token of a text; row t is about a draft that begins after `prompt + text[:t]`.

        Args:
            prompt: token ids, at least one.
            text: the token ids that continue it, at least one.
            seed: of each draft's choices when sampling, whichever drafts are recorded beside it.

        Returns:
            For each draft `drafted`, shape (tokens of text,), the arrays of `PER_TOKEN`, shape (tokens of text, K), and
            `successor`, shape (tokens of text, K + 1): the target's likeliest token after 0, 1, ... of the drafted
            ones; -1 beyond the draft.

        Raises:
            PromptError: prompt, text and a draft after them do not fit into a model's context.
            NumericalError: the target gave NaN or infinite logits.
        """
        assert self.pair.draft is not None
        reader, begun = self.pair.target.begin(prompt)  # an encoder reads the prompt, and the text begins anew
        context = [*begun, *text]
        self._check_room(context, len(begun))
        rules = TextRules.of(self.pair, begun, len(text), self.sampling, source=prompt)
        target = rules.target(reader)
        if len(begun) > 1:
            target.read(begun[:-1])
        draft = beside(self.pair.draft, target) if target.source else self.pair.draft
        chains = [
            _chains(part, self, begun, torch.Generator(target.device).manual_seed(seed))
            for part in drafts_of(rules.drafter(draft, target))
        ]
        parts: list[list[Rows]] = []
        for start in range(len(begun) - 1, len(context) - 1, STRETCH):
            stretch = context[start : min(start + STRETCH, len(context) - 1)]
            parts.append(
                self._read(target, stretch, [list(chain.grow(context, start, len(stretch))) for chain in chains])
            )
        return [
            {name: np.concatenate([part[name] for part in draft]) for name in draft[0]}
            for draft in zip(*parts, strict=True)
        ]

    def distribution(self, scores: Tensor) -> Tensor:
        """Return the distribution of tokens; at temperature 1 when greedy, where it would be one-hot."""
        return scores.softmax(-1) if self.sampling.greedy else self.sampling.probabilities(scores)

    def _check_room(self, context: Sequence[int], prompt: int) -> None:
        for model in (self.pair.target, *draft_models(self.pair.draft)):
            switch = model.pass_limit(prompt - 1)
            if switch < min(model.context_limit, len(context) + self.draft_length):
                raise PromptError(
                    f"{len(context)} tokens of prompt and text pass position {switch}, where {model.name} changes its "
                    "rotation of positions, and a recording reads the text on both sides together; record fewer tokens"
                )
            if model.room(context) < self.draft_length:
                raise PromptError(
                    f"{len(context)} tokens of prompt and text and a draft of {self.draft_length} do not fit into the "
                    f"context of {model.name} ({model.context_limit}); record fewer tokens, or shorten the prompts"
                )

    def _read(self, target: LanguageModel, stretch: Sequence[int], drafts: Sequence[Sequence[Level]]) -> list[Rows]:
        """Let the target read a stretch with all its branches, and compare; only the stretch stays in the cache."""
        positions = len(stretch)
        comb = _Comb(stretch)
        places = [comb.add(levels) for levels in drafts]
        if target.branches:
            scores = target.forward(torch.tensor(comb.tokens, device=target.device), TokenTree(comb.parents)).scores
        else:
            scores = _read_in_chains(target, comb, positions, places)
        if not bool(torch.isfinite(scores.amax(-1).sum())):
            raise NumericalError(
                f"{target.name} gave NaN or infinite logits; load it in float32 or bfloat16, or check its weights"
            )
        if target.branches:
            target.keep(range(positions))
        likeliest = scores.argmax(-1).cpu().numpy()
        return [
            self._rows(scores, likeliest, positions, levels, nodes)
            for levels, nodes in zip(drafts, places, strict=True)
        ]

    def _rows(
        self,
        scores: Tensor,
        likeliest: NDArray[np.integer],
        positions: int,
        levels: Sequence[Level],
        nodes: _Places,
    ) -> Rows:
        """Rows of one draft, of whose tokens the nodes in the tree and those before them are known by level."""
        rows: Rows = {name: np.zeros((positions, self.draft_length), dtype) for name, dtype in PER_TOKEN.items()}
        drafted = np.zeros(positions, np.uint8)
        successor = np.full((positions, self.draft_length + 1), -1)
        successor[:, 0] = likeliest[:positions]
        for place, (level, (parents, ends)) in enumerate(zip(levels, nodes, strict=True)):
            reached = level.rows.cpu().numpy()
            before = scores[torch.from_numpy(parents).to(scores.device)]
            for name, values in self._compare(before, level).items():
                rows[name][reached, place] = values.cpu().numpy()
            drafted[reached] += 1
            successor[reached, place + 1] = likeliest[ends]
        return {"drafted": drafted, "successor": successor, **rows}

    def _compare(self, scores: Tensor, level: Level) -> dict[str, Tensor]:
        p, q = self.distribution(scores), level.distribution
        column = level.tokens.unsqueeze(-1)
        p_of_token = p.gather(-1, column).squeeze(-1)
        return {
            "tokens": level.tokens,
            "match": scores.argmax(-1) == level.tokens,
            "confidence": level.confidence,
            "bins": torch.from_numpy(bins_of(level.confidence.cpu().numpy())),
            "entropy": torch.zeros_like(p_of_token) if q is None else entropy(q),
            "q": torch.ones_like(p_of_token) if q is None else q.gather(-1, column).squeeze(-1),
            "p": p_of_token,
            "distance": 1 - p_of_token if q is None else total_variation(p, q),
            "target_entropy": entropy(p),
            "top_ten": level.top_ten,
            "matched": level.matched,
        }


PER_TOKEN = {
    "tokens": np.int32,
    "match": np.bool_,
    "confidence": np.float32,
    "bins": np.uint8,
    "entropy": np.float32,
    "q": np.float32,
    "p": np.float32,
    "distance": np.float32,
    "target_entropy": np.float32,
    "top_ten": np.float32,
    "matched": np.uint8,
}
"""Columns of every drafted token, as `Trace` describes them, and their types."""


def entropy(distribution: Tensor) -> Tensor:
    """In nats, shape (..., vocabulary) to (...)."""
    return torch.special.entr(distribution).sum(-1)


class _Comb:
    """A stretch of text, and the chains that drafts hang at its positions, as one tree.

    A token that follows the same tokens as another, in the text or in the chain of any draft, shares its node.

    Attributes:
        tokens: of the nodes, those of the stretch first.
        parents: the node before each, -1 for the first.
    """

    def __init__(self, stretch: Sequence[int]) -> None:
        self.tokens = list(stretch)
        self.parents = list(range(-1, len(stretch) - 1))
        self._positions = len(stretch)
        self._nodes = dict(zip(zip(self.parents, self.tokens, strict=True), range(len(stretch)), strict=True))

    def add(self, levels: Sequence[Level]) -> _Places:
        """Hang the chains of a draft; for each level the nodes before its tokens, and those of its tokens."""
        ends = np.arange(self._positions)
        places = []
        for level in levels:
            reached = level.rows.cpu().numpy()
            before = ends[reached]
            ends[reached] = [self._node(*key) for key in zip(before.tolist(), level.tokens.tolist(), strict=True)]
            places.append((before, ends[reached]))
        return places

    def _node(self, parent: int, token: int) -> int:
        node = self._nodes.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
        return node


def _read_in_chains(target: LanguageModel, comb: _Comb, positions: int, places: Sequence[_Places]) -> Tensor:
    """Let a target that reads chains alone read a comb: at each position the chain of one draft after another.

    Args:
        target: has read the text before the comb, and has read the stretch, too, when this returns.
        comb: with the chains of all drafts.
        positions: of the stretch.
        places: what `_Comb.add` returned for each draft.

    Returns:
        Scores, shape (nodes, vocabulary).
    """
    scores: Tensor | None = None
    for position in range(positions):
        start = target.length
        for levels in places:
            target.truncate(start)
            nodes = [position]
            for before, ends in levels:
                nodes += ends[before == nodes[-1]].tolist()[:1]
            tokens = torch.tensor([comb.tokens[node] for node in nodes], device=target.device)
            read = target.forward(tokens).scores
            scores = read.new_zeros(len(comb.tokens), read.shape[-1]) if scores is None else scores
            scores[nodes] = read
        target.truncate(start + 1)
    assert scores is not None  # a stretch has a position
    return scores


class _ModelChains:
    """A draft model's chains: one pass a level, over all positions of the stretch."""

    def __init__(
        self, model: LanguageModel, recorder: Recorder, prompt: Sequence[int], generator: torch.Generator
    ) -> None:
        self._model = model
        self._recorder = recorder
        self._generator = generator
        model.read(prompt[:-1])

    def grow(self, context: Sequence[int], start: int, positions: int) -> Iterator[Level]:
        device, target_device = self._model.device, self._generator.device
        unread = torch.tensor(context[start : start + positions], device=device)
        parents = list(range(-1, positions - 1))
        rows = torch.arange(positions, device=target_device)
        matched = torch.zeros(positions, dtype=torch.uint8)
        for _ in range(self._recorder.draft_length):
            scores = self._model.forward(unread, TokenTree(parents), last=positions).scores.to(target_device)
            q = self._recorder.distribution(scores)
            tokens = scores.argmax(-1) if self._recorder.sampling.greedy else draw(q, self._generator)
            yield Level(rows, tokens, q, q.amax(-1), likeliest_of_ten(scores), matched)
            unread = tokens.to(device)
            parents += range(len(parents) - positions, len(parents))
        self._model.keep(range(positions))


class _AskedChains:
    """The chains of a draft that is no model, or one read in chains alone, asked for at one position after another.

    An EAGLE head reads states of the target at all positions before: a copy of the target reads ahead for it.
    """

    def __init__(self, drafter: Drafter, recorder: Recorder, prompt: Sequence[int], generator: torch.Generator) -> None:
        self._recorder = recorder
        self._device = generator.device
        self._ahead: LanguageModel | None = None
        if isinstance(drafter, EagleDrafter):
            self._ahead = recorder.pair.target.fresh()
            self._ahead.read(prompt[:-1])
            drafter = drafter.beside(self._ahead)
        self._session = drafter.start(prompt, recorder.sampling, generator, generator.device)

    def grow(self, context: Sequence[int], start: int, positions: int) -> Iterator[Level]:
        chains = []
        if self._ahead is not None:
            self._ahead.read(context[start : start + positions])
        for end in range(start + 1, start + 1 + positions):
            chains.append(list(self._session.steps(context[:end], self._recorder.draft_length)))
            self._session.truncate(end)  # the text stays, as if all this had been rejected
        for place in range(max(map(len, chains))):
            reached = [row for row, chain in enumerate(chains) if len(chain) > place]
            yield self._level(reached, [chains[row][place] for row in reached])

    def _level(self, reached: Sequence[int], steps: Sequence[DraftStep]) -> Level:
        confidence = torch.tensor([step.confidence() for step in steps], device=self._device)
        tokens = torch.tensor([int(step.token) for step in steps], device=self._device)
        top_ten, distribution = confidence, None
        scored = [(number, step.logits) for number, step in enumerate(steps) if step.logits is not None]
        if scored:  # some of its tokens are a model's
            numbers, scores = torch.tensor([number for number, _ in scored]), torch.cat([rows for _, rows in scored])
            distribution = torch.nn.functional.one_hot(tokens, scores.shape[-1]).float()
            distribution[numbers] = self._recorder.distribution(scores)
            top_ten = confidence.clone()
            top_ten[numbers] = likeliest_of_ten(scores)
        return Level(
            torch.tensor(reached, device=self._device),
            tokens,
            distribution,
            confidence,
            top_ten,
            torch.tensor([min(step.matched, 255) for step in steps], dtype=torch.uint8),
        )


def _chains(
    draft: Drafter, recorder: Recorder, prompt: Sequence[int], generator: torch.Generator
) -> _ModelChains | _AskedChains:
    if isinstance(draft, ModelDrafter) and draft.model.branches:
        return _ModelChains(draft.model.fresh(), recorder, prompt, generator)
    return _AskedChains(draft, recorder, prompt, generator)
