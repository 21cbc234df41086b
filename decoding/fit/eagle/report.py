"""Reports on EAGLE heads: how near they come to their target on held-out text, and the speed of decoding with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ...decoders.autoregressive import AutoregressiveDecoder, Side, decode_in_turns
from ...decoders.chain import SpeculativeDecoder
from ...drafts.eagle.head import EagleHead
from ...loading.pair import load_pair
from ..cards import Section
from ..draft.report import ReportSettings, prompts_of_sets
from ..loop import HeldOutLoss
from ..measure import SPEED_HEADING, SPEED_NOTE, Speed, speed_rows
from ..text.prompts import TRAINING
from .features import Features
from .unroll import states_of

_PLAIN = ""


@dataclass
class EagleReportSettings(ReportSettings):
    """Measurements of the finished head, besides its quality on held-out text."""

    report_prompts: int = 6
    """Test prompts of each shipped set to decode with the finished head; 0 skips this report."""
    compared_with: tuple[str, ...] = ()
    """Other drafts of the target to decode the same prompts with: shipped models, folders, suffix, ..."""


@dataclass(frozen=True)
class HeadQuality:
    """Agreement of a head with its target at the tokens that the target wrote in held-out texts.

    By the tokens that the head has drafted before.

    Attributes:
        counts: positions, shape (steps,).
        alpha: mean over them of the sum over tokens of min(target, head) at temperature 1, shape (steps,).
        greedy_match: share of positions where both have the same likeliest token, shape (steps,).
        covered: mean probability that the target gives to the tokens which the head can propose, of the first step.
    """

    counts: np.ndarray
    alpha: np.ndarray
    greedy_match: np.ndarray
    covered: float


@torch.inference_mode()
def measure_head(head: EagleHead, features: Features, steps: int, batch: int = 8) -> dict[str, HeadQuality]:
    """Measure a head by domain, on the texts that were not trained on.

    Args:
        head: attached to its target.
        features: of the target's texts.
        steps: tokens of a draft to look at.
        batch: texts at a time.
    """
    text = features.text
    whole = head.model.get_output_embeddings()
    results = {}
    for place, domain in enumerate(tqdm(text.domains, unit="domain", mininterval=5.0, desc="held-out text")):
        rows = np.flatnonzero((text.side != TRAINING) & (text.domain == place))
        sums = np.zeros((steps, 3))
        covered = 0.0
        for start in range(0, len(rows), batch):
            part = features.of(rows[start : start + batch], head.norm.weight.device)
            first = part.counted(0)
            p = whole(part.last[:, 1:][first].to(head.model.dtype)).float().softmax(-1)
            likeliest = p.argmax(-1)
            p = p[:, head.tokens] if head.shape.vocabulary else p
            covered += float(p.sum())
            for step, states in enumerate(states_of(head, part, steps)):
                counted = part.counted(step)
                chosen = counted[first]
                q = head.scores(states[counted]).float().softmax(-1)
                alpha = torch.minimum(p[chosen], q).sum()
                best = q.argmax(-1)
                match = (head.tokens[best] if head.shape.vocabulary else best) == likeliest[chosen]
                sums[step] += [float(chosen.sum()), float(alpha), float(match.sum())]
        counts = np.maximum(sums[:, 0], 1)
        results[domain] = HeadQuality(sums[:, 0], sums[:, 1] / counts, sums[:, 2] / counts, covered / counts[0])
    return results


@dataclass(frozen=True)
class EagleReport:
    """Measurements of a finished head.

    Attributes:
        quality: on held-out text, by domain.
        loss: loss on held-out text.
    """

    quality: Mapping[str, HeadQuality]
    loss: HeldOutLoss

    def section(self) -> Section:
        """A section of the card."""
        steps = range(len(next(iter(self.quality.values())).counts))
        rows = [["domain", "tokens", "covered", *(f"{name} {k + 1}" for name in ("match", "alpha") for k in steps)]]
        for domain, quality in self.quality.items():
            shares = [*quality.greedy_match, *quality.alpha]
            rows.append([domain, f"{quality.counts[0]:,.0f}", f"{quality.covered:.3f}", *(f"{s:.3f}" for s in shares)])
        intro = (
            "Agreement with the target at every token that it wrote in held-out texts, for the first, second, ... "
            "token of a draft, those before it being the target's. Match is the share of positions where both have "
            "the same most likely token; alpha is the mean of the sum over tokens of min(target, head) at temperature"
            " 1: the chance that a token drafted there is accepted. Covered is the probability that the target gives "
            "to the tokens which the head can propose, which alpha cannot exceed. Training was stopped by the loss on"
            " half of these texts, which flatters them a little:"
        )
        return Section("Held-out text", [intro, rows])


def speed_section(settings: EagleReportSettings, target: str, out: Path) -> Section:
    """Decode test prompts of every shipped set by the head, by other drafts and plainly; a section of the card.

    Args:
        settings: which prompts, how long, and which other drafts.
        target: name of the target, as `load_pair` takes it.
        out: folder of the head.
    """
    drafts = {out.name: str(out), **{name: name for name in settings.compared_with}}
    plain = load_pair(target)
    sets = prompts_of_sets(plain, settings)
    rows_of = [(name, row) for name, rows in sets.items() for row in rows]
    knobs = {"draft_length": settings.report_draft_length}
    sides: dict[str, Side] = {_PLAIN: Side(AutoregressiveDecoder(plain))}
    for name, draft in drafts.items():
        pair = load_pair(f"{target}+{draft}")
        sides[name] = Side(SpeculativeDecoder(pair, max_draft_length=settings.report_draft_length), knobs)
    speeds = {(name, draft): Speed() for name in sets for draft in drafts}
    counts = {key: np.zeros(2) for key in speeds}
    turns = decode_in_turns(sides, [row for _, row in rows_of], max_new_tokens=settings.report_tokens)
    bar = tqdm(turns, total=len(rows_of), unit="prompt", mininterval=5.0, desc="speed")
    for (name, _), generations in zip(rows_of, bar, strict=True):
        for draft in drafts:
            speeds[name, draft] += Speed.of(generations[draft], generations[_PLAIN])
            counts[name, draft] += [
                sum(getattr(round_, part) for round_ in generations[draft].rounds) for part in ("accepted", "drafted")
            ]
    for draft in drafts:
        speeds["all", draft] = sum((speeds[name, draft] for name in sets), Speed())
        counts["all", draft] = sum((counts[name, draft] for name in sets), np.zeros(2))
    rows = [["prompts, draft", "accepted", *SPEED_HEADING]]
    for (name, draft), speed in speeds.items():
        accepted, drafted = counts[name, draft]
        (_, cells, _) = speed_rows("", {"": speed})
        rows.append([f"{name}, {draft}", f"{accepted / max(1, drafted):.3f}", *cells[1:]])
    intro = (
        f"Greedy decoding of {settings.report_prompts} test prompts of each shipped set, at most "
        f"{settings.report_tokens} tokens after each, {settings.report_draft_length} drafted a round, in turns with "
        "plain decoding; accepted is the share of drafted tokens:"
    )
    return Section("Decoding", [intro, rows, SPEED_NOTE])
