"""Reports on Medusa heads: accuracies by rank, the tree built from them, and the speed of decoding with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ...decoders.medusa.decoder import MedusaDecoder
from ...decoders.medusa.heads import MedusaHeads
from ...decoders.medusa.trees import LARGEST_TREE, CandidateTree
from ...loading.pair import Pair
from ..cards import Rows, Section
from ..loop import HeldOutLoss
from ..measure import SPEED_NOTE, Quality, Speed, compare, speed_rows
from ..text.prompts import SPEED
from ..text.states import IGNORED, HiddenStates
from ..text.target_text import TargetText

_POSITIONS_AT_A_TIME = 512
_SHOWN_RANKS = 8


@dataclass(frozen=True)
class Accuracy:
    """Shares of positions, in [0, 1].

    Attributes:
        shares: share of positions at which the token of each head and rank was right, shape (heads, ranks).
        counts: positions that each head was judged on, shape (heads,), int64.
    """

    shares: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, hits: np.ndarray, seen: np.ndarray) -> Accuracy:
        """Shares by counts of hits, shape (heads, ranks), and of positions, shape (heads,)."""
        return cls(hits / np.maximum(seen, 1)[:, None], seen)

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """The shares in the form of `MedusaHeads.accuracies`."""
        return tuple(tuple(row) for row in self.shares.tolist())

    def top(self, ranks: int) -> np.ndarray:
        """Share of positions at which any of a head's first ranks was right, shape (heads,)."""
        return self.shares[:, :ranks].sum(1)


def accuracies(
    heads: MedusaHeads, states: HiddenStates, positions: np.ndarray
) -> tuple[Accuracy, Mapping[str, Accuracy]]:
    """Judge attached heads in total and by domain, at the positions with these numbers, shape (m,), int64.

    A head whose reduced vocabulary lacks the right token is wrong.
    """
    count, ranks = heads.shape.heads, min(LARGEST_TREE, heads.shape.outputs)  # so that even one head alone can fill it
    domains = states.text.domains
    hits = np.zeros((len(domains), count, ranks), dtype=np.int64)
    seen = np.zeros((len(domains), count), dtype=np.int64)
    device = heads.weight.device
    domain_of = states.text.domain[states.row[positions]]
    starts = range(0, len(positions), _POSITIONS_AT_A_TIME)
    for start in tqdm(starts, unit="batch", mininterval=5.0, desc="accuracies"):
        part = positions[start : start + _POSITIONS_AT_A_TIME]
        labels = states.labels(part, count).to(device)
        with torch.inference_mode():
            ranked = heads(states.hidden(part).to(device)).topk(ranks, dim=-1).indices
        counted = labels != IGNORED
        # A label that the heads cannot propose becomes IGNORED too, which no place is; it counts as wrong.
        places = torch.where(counted, heads.places_of(labels.clamp(min=0)), IGNORED)
        right = (ranked == places.unsqueeze(-1)).cpu().numpy()
        part_domain = domain_of[start : start + _POSITIONS_AT_A_TIME]
        for place in np.unique(part_domain):
            members = part_domain == place
            hits[place] += right[:, members].sum(1)
            seen[place] += counted.cpu().numpy()[:, members].sum(1)
    by_domain = {domain: Accuracy.of(hits[place], seen[place]) for place, domain in enumerate(domains)}
    return Accuracy.of(hits.sum(0), seen.sum(0)), by_domain


def speed_prompts(text: TargetText, count: int) -> dict[str, list[list[int]]]:
    """Held-out prompts by domain, as many of each as ``count`` allows and at least one."""
    prompts = {}
    for place, domain in enumerate(text.domains):
        rows = np.flatnonzero((text.side == SPEED) & (text.domain == place))[: max(1, count // len(text.domains))]
        prompts[domain] = [text.tokens[row, : text.prompts[row]].tolist() for row in rows]
    return prompts


def measure_speed(
    pair: Pair, heads: MedusaHeads, prompts: Mapping[str, Sequence[Sequence[int]]], size: int, new_tokens: int
) -> dict[str, Speed]:
    """Generate greedily from the same prompts, token ids by domain, with and without heads.

    ``size`` candidates are verified a round; at most ``new_tokens`` follow each prompt.
    """
    decoder = MedusaDecoder(pair, heads, max_tree=size)
    knobs = {"heads": heads.shape.heads, "tree_size": size}
    speeds = dict.fromkeys(prompts, Speed())
    for domain, generation, plain in compare(decoder, knobs, prompts, new_tokens):
        speeds[domain] += Speed.of(generation, plain)
    return speeds


@dataclass(frozen=True)
class MedusaReport:
    """Measurements of finished heads.

    Attributes:
        accuracy: on held-out text of the target, the half by whose loss the weights were chosen.
        by_domain: the accuracy in each domain.
        tree: the sparse tree of the size asked for.
        expected: tokens per round that the accuracies promise with this tree.
        speed: by domain, from the prompts of the other half, which come from another part of the text.
        new_tokens: most tokens after each of them.
        loss: loss on held-out text.
    """

    accuracy: Accuracy
    by_domain: Mapping[str, Accuracy]
    tree: CandidateTree
    expected: float
    speed: Mapping[str, Speed]
    new_tokens: int
    loss: HeldOutLoss

    @property
    def whole(self) -> Speed:
        """The speed over all domains."""
        return sum(self.speed.values(), Speed())

    def expectation(self) -> str:
        """A sentence on the tree."""
        return (
            f"The {len(self.tree)} likeliest candidates by these accuracies use {self.tree.heads} heads and promise "
            f"{self.expected:.2f} tokens a round, if heads err independently; measured: "
            f"{self.whole.tokens_per_round:.2f}."
        )

    def section(self) -> Section:
        """A section of the card, with tables by rank, by domain and of the speed."""
        total = self.accuracy.shares.shape[1]
        ranks = range(1, min(_SHOWN_RANKS, total) + 1)
        by_rank = [["head, right in %", *(f"#{rank}" for rank in ranks), f"#1 to #{total}"]]
        for head, row in enumerate(self.accuracy.shares, 1):
            by_rank.append([str(head), *(f"{100 * share:.1f}" for share in (*row[: len(ranks)], row.sum()))])
        by_domain = [["domain, head, right in %", "#1", "#1 to #5"]]
        for domain, accuracy in self.by_domain.items():
            for head, (first, five) in enumerate(zip(accuracy.top(1), accuracy.top(5), strict=True), 1):
                by_domain.append([f"{domain}, {head}", f"{100 * first:.1f}", f"{100 * five:.1f}"])
        intro = (
            f"Share, in per cent of {self.accuracy.counts[0]:,} positions of the target's text, at which the token "
            "that a head ranks first, second, ... is the right one (the first head guesses the token after the next). "
            "Training kept the weights with the lowest loss on these texts, which flatters them a little:"
        )
        speed = (
            f"Greedy decoding, at most {self.new_tokens} tokens after each prompt from another part of the held-out "
            "text, compared with plain decoding:"
        )
        parts = [intro, by_rank, by_domain, self.expectation(), speed, speed_rows("domain", self.speed), SPEED_NOTE]
        return Section("Held-out text", parts)


@dataclass(frozen=True)
class TargetMeasurements:
    """Measurements of a target and its heads on held-out text.

    Attributes:
        quality: quality of the target, by domain.
        accuracy: accuracy of the heads, on text of the original target.
        speed: speed of greedy decoding with the heads, by domain.
    """

    quality: Mapping[str, Quality]
    accuracy: Accuracy
    speed: Mapping[str, Speed]

    @property
    def whole(self) -> Speed:
        """The speed over all domains."""
        return sum(self.speed.values(), Speed())


@dataclass(frozen=True)
class JointReport:
    """Effect of joint training.

    Attributes:
        before: measurements before training.
        after: measurements after training.
        loss: loss on held-out text.
    """

    before: TargetMeasurements
    after: TargetMeasurements
    loss: HeldOutLoss

    def table(self) -> Rows:
        """A table, heading first."""
        rows = [["on held-out text", "before", "after"]]
        for domain, quality in self.before.quality.items():
            later = self.after.quality[domain]
            rows.append([f"perplexity, {domain}", f"{quality.perplexity:.2f}", f"{later.perplexity:.2f}"])
        for ranks in (1, 5):
            both = zip(self.before.accuracy.top(ranks), self.after.accuracy.top(ranks), strict=True)
            for head, shares in enumerate(both, 1):
                label = f"head {head} right in its first {ranks}" if ranks > 1 else f"head {head} right at once"
                rows.append([f"{label}, %", *(f"{100 * share:.1f}" for share in shares)])
        for label, name in (("tokens a round", "tokens_per_round"), ("speedup over plain decoding", "speedup")):
            rows.append([label, *(f"{getattr(side.whole, name):.2f}" for side in (self.before, self.after))])
        return rows
