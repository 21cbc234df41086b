"""Toy targets have a known distribution of texts: what decoders are held against, exactly or by a chi-square test.

On the path of imports by `pythonpath` in pyproject.toml, since test modules cannot import one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import LogitsProcessor

from specgym.decoding.decoder import Decoder
from specgym.decoding.decoders import autoregressive, threshold
from specgym.decoding.decoders import chain_session as speculative
from specgym.decoding.decoders.pipelined.decoder import PipelinedThresholdDecoder
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.drafts import cascade
from specgym.decoding.drafts import drafter as drafters
from specgym.decoding.drafts.cascade import CascadeDrafter
from specgym.decoding.drafts.copying import PromptLookupDrafter, SuffixDrafter
from specgym.decoding.drafts.drafter import Drafter, ModelDrafter
from specgym.decoding.drafts.eagle import drafter as eagle
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.sampling import Sampling
from tests.helpers.other_words import translated_table

Joint = dict[tuple[int, ...], float]
"""Probabilities of texts, by their tokens."""

PROMPT = (1, 0, 1)
MakeTable = Callable[..., Any]

SAMPLINGS = {
    "plain": Sampling(),
    "cold": Sampling(0.6),
    "hot": Sampling(1.7),
    "top-k": Sampling(1.2, top_k=2),
    "top-p": Sampling(0.9, top_p=0.8),
    "all": Sampling(0.8, top_k=5, top_p=0.9),
}


def conditional(
    target: LanguageModel, sampling: Sampling, prefix: Sequence[int], processors: Sequence[LogitsProcessor] = ()
) -> Tensor:
    """The target's own distribution of the next token, shape (vocabulary,), float64, after logits processors."""
    scores: Any = target.fresh().forward(torch.tensor(prefix), last=1).scores
    text: Any = torch.tensor([list(prefix)])
    for processor in processors:
        scores = processor(text, scores)
    return sampling.probabilities(scores)[0].double()


def exact_joint(
    target: LanguageModel,
    sampling: Sampling,
    prompt: Sequence[int],
    length: int,
    processors: Sequence[LogitsProcessor] = (),
) -> Joint:
    """Probability of every run of `length` tokens after a prompt."""
    joint: Joint = {(): 1.0}
    for _ in range(length):
        joint = {
            (*text, token): weight * p
            for text, weight in joint.items()
            for token, p in enumerate(conditional(target, sampling, (*prompt, *text), processors).tolist())
        }
    return joint


def distance(joint: Joint, other: Joint) -> float:
    """Total variation of two joint distributions."""
    return sum(abs(joint.get(text, 0.0) - other.get(text, 0.0)) for text in joint.keys() | other.keys()) / 2


def p_value_of(counts: Mapping[tuple[int, ...], int], joint: Joint) -> float:
    """P value of a chi-square test on counts of drawn texts; 0 if an impossible text was drawn."""
    drawn = sum(counts.values())
    expected = {text: drawn * p for text, p in joint.items()}
    if any(expected[text] < 1e-9 * drawn for text in counts):
        return 0.0
    common = [text for text, count in expected.items() if count >= 5]
    observed = [counts.get(text, 0) for text in common]
    common_counts = [expected[text] for text in common]
    rest = drawn - sum(common_counts)
    if rest >= 5:  # rare texts count as one class
        observed.append(drawn - sum(observed))
        common_counts.append(rest)
    scale = sum(observed) / sum(common_counts)
    return float(stats.chisquare(observed, [scale * count for count in common_counts]).pvalue)


class Branches:
    """Walks every outcome of a random procedure: `choose` stands for its random choices.

    Attributes:
        weight: probability of the present outcome, when the procedure has ended.
    """

    def __init__(self) -> None:
        self._trail: list[tuple[list[int], int]] = []  # at each choice the possible options, and which one is taken
        self._depth = 0
        self.weight = 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        """One of the options that are possible, beyond rounding."""
        if self._depth == len(self._trail):
            self._trail.append(([option for option, p in enumerate(probabilities) if p > 1e-12], 0))
        options, taken = self._trail[self._depth]
        self._depth += 1
        self.weight *= probabilities[options[taken]]
        return options[taken]

    def __iter__(self) -> Iterator[None]:
        while True:
            self._depth, self.weight = 0, 1.0
            yield
            while self._trail and self._trail[-1][1] == len(self._trail[-1][0]) - 1:
                self._trail.pop()
            if not self._trail:
                return
            options, taken = self._trail[-1]
            self._trail[-1] = (options, taken + 1)


def make_drafter(kind: str, make_table: MakeTable, vocabulary: int) -> Drafter:
    """A draft that is often right and often wrong."""
    if kind in ("model", "reduced"):
        table = make_table(vocabulary, seed=2, spread=1.0)
        if kind == "reduced":  # as `reduced_output` leaves a token out
            table.table[..., 0] = torch.finfo(torch.float32).min
        return ModelDrafter(table)
    if kind == "translated":
        return ModelDrafter(translated_table(vocabulary, seed=2))
    if kind == "ngram":
        text = torch.randint(0, vocabulary, (60,), generator=torch.Generator().manual_seed(3)).tolist()
        return NGramDrafter.fit([text], vocabulary, order=3)
    if kind == "suffix":
        return SuffixDrafter(vocabulary, longest=2)
    if kind == "cascade":
        return CascadeDrafter(make_table(vocabulary, seed=2, spread=1.0), SuffixDrafter(vocabulary, longest=2))
    return PromptLookupDrafter(vocabulary, longest=2)


def walk(
    monkeypatch: pytest.MonkeyPatch,
    decoder: Decoder,
    sampling: Sampling,
    length: int,
    knobs: dict[str, float] | None = None,
    ahead: int = 0,
    processors: Sequence[LogitsProcessor] = (),
) -> tuple[dict[tuple[int, ...], float], float, float]:
    """All outcomes of a decoder: the joint distribution of the first tokens, and the mean reported divergence.

    Args:
        ahead: how many tokens more the session may generate, so that drafts reach beyond those that are looked at.
        processors: logits processors of the text.

    Returns:
        The joint distribution, the expected sum of the divergences reported, and the expected number of tokens.
    """
    branches = Branches()

    def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
        choice = branches.choose(p.double().flatten().tolist())
        return torch.tensor(choice).expand(p.shape[:-1])

    def accepts(p: Tensor, q: Tensor | float, uniform: Tensor) -> Tensor:
        q = torch.as_tensor(q).expand(p.shape)
        chances = [min(1.0, a / b) if b > 0 else float(a > 0) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
        flags = []
        for chance in chances:
            # A speculative session stops at the first rejection; the threshold decoder may overrule it.
            pointless = not isinstance(decoder, ThresholdDecoder | PipelinedThresholdDecoder) and False in flags
            flags.append(False if pointless else bool(branches.choose([1 - chance, chance])))
        return torch.tensor(flags, dtype=torch.bool)

    joint: dict[tuple[int, ...], float] = {}
    divergence = tokens = 0.0
    with monkeypatch.context() as patch:
        for module in (autoregressive, cascade, drafters, eagle, speculative, threshold):
            patch.setattr(module, "draw", draw)
        patch.setattr(speculative, "accepts", accepts)
        for _ in branches:
            session = decoder.start(
                PROMPT, max_new_tokens=length + ahead, sampling=sampling, seed=0, logits_processor=processors
            )
            reported = 0.0
            while len(session.tokens) < length:
                reported += session.step(knobs).divergence
            text = tuple(session.tokens[:length])
            joint[text] = joint.get(text, 0.0) + branches.weight
            divergence += branches.weight * reported
            tokens += branches.weight * len(session.tokens)
    return joint, divergence, tokens


def strayed(joint: Joint, target: LanguageModel, sampling: Sampling, length: int) -> tuple[float, float]:
    """Total variation of the tokens' conditional distributions from the target's.

    Args:
        joint: probabilities of texts of `length` tokens after `PROMPT`.
        target: of which the texts are meant to be.
        sampling: how its tokens are chosen.
        length: in tokens.

    Returns:
        The expected sum over a text, and the largest.
    """
    expected = largest = 0.0
    for place in range(length):
        rows: dict[tuple[int, ...], Tensor] = {}
        for text, weight in joint.items():
            row = rows.setdefault(text[:place], torch.zeros(target.vocabulary_size, dtype=torch.float64))
            row[text[place]] += weight
        for prefix, row in rows.items():
            if (mass := float(row.sum())) >= 1e-9:
                off = float((row / mass - conditional(target, sampling, (*PROMPT, *prefix))).abs().sum() / 2)
                expected += mass * off
                largest = max(largest, off)
    return expected, largest
