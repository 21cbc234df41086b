"""What a draft is worth in decoding, on prompts of the shipped sets: how often it is right, and the speedup."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from ..decoder import Generation
from ..decoders.speculative import SpeculativeDecoder
from ..loading.pair import Pair
from ..prompts.prompt_set import encode, load_prompts, shipped_prompts
from .card import markdown
from .errors import FitError
from .measure import Quality, measure
from .speed import COLUMNS, Speed, compare


@dataclass
class ReportSettings:
    """What is measured of a finished draft."""

    report_prompts: int = 0
    """Prompts of each shipped set, of those for testing, that are decoded with the finished draft; 0 leaves it out."""
    report_tokens: int = 64
    """Tokens generated after each of them."""
    report_draft_length: int = 4
    """Tokens drafted a round."""


@dataclass(frozen=True)
class Drafting:
    """What a draft did on the prompts of one set.

    Attributes:
        quality: at every token of plain greedy decoding.
        accepted: drafted tokens that stayed, as a share.
        speed: of greedy decoding with the draft.
    """

    quality: Quality
    accepted: float
    speed: Speed


def check_report_settings(settings: ReportSettings) -> None:
    """Refuse what makes no sense.

    Raises:
        FitError: a setting is out of range.
    """
    for name, least in (("report_prompts", 0), ("report_tokens", 1), ("report_draft_length", 1)):
        if getattr(settings, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise FitError(f"{option} {getattr(settings, name)} makes no sense: give at least {least}")


def measure_drafting(pair: Pair, draft: nn.Module, settings: ReportSettings) -> dict[str, Drafting]:
    """Decode prompts of every shipped set with and without the draft.

    Args:
        pair: the target, as decoders have it, with the draft; it has a tokeniser.
        draft: the model that drafts.
        settings: how many prompts, and how.
    """
    assert pair.tokenizer is not None
    room = pair.target.context_limit - settings.report_tokens
    prompts = {
        name: encode(load_prompts(name, limit=settings.report_prompts), "test", pair.tokenizer, room)
        for name in shipped_prompts()
    }
    made: dict[str, list[tuple[Generation, Generation]]] = {name: [] for name in prompts}
    decoder = SpeculativeDecoder(pair, max_draft_length=settings.report_draft_length)
    knobs = {"draft_length": settings.report_draft_length}
    for name, drafted, plain in compare(decoder, knobs, prompts, settings.report_tokens):
        made[name].append((drafted, plain))
    found = {}
    for name, both in made.items():
        rounds = [cycle for drafted, _ in both for cycle in drafted.rounds]
        texts = [[*prompt, *plain.tokens] for prompt, (_, plain) in zip(prompts[name], both, strict=True)]
        found[name] = Drafting(
            quality=_quality(draft, pair.target.model, texts, [len(prompt) for prompt in prompts[name]]),
            accepted=sum(cycle.accepted for cycle in rounds) / max(1, sum(cycle.drafted for cycle in rounds)),
            speed=sum((Speed.of(*each) for each in both), Speed()),
        )
    return found


def _quality(draft: nn.Module, target: nn.Module, texts: list[list[int]], prompts: list[int]) -> Quality:
    """At every token after the prompts, which have so many tokens."""
    width = max(map(len, texts))
    windows = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    place = torch.arange(1, width)
    written = [(place >= prompt) & (place < len(text)) for text, prompt in zip(texts, prompts, strict=True)]
    return measure(draft, windows, target, batch=1, counted=torch.stack(written))


def report_rows(found: dict[str, Drafting]) -> list[list[str]]:
    """A table, its heading first; covered only where the draft proposes some tokens alone."""
    reduced = not any(math.isnan(each.quality.covered) for each in found.values())
    rows = [["prompts", "alpha", *(["covered"] if reduced else []), "greedy match", "accepted", *COLUMNS]]
    for name, each in found.items():
        quality = each.quality
        shares = [quality.alpha, *([quality.covered] if reduced else []), quality.greedy_match, each.accepted]
        rows.append([name, *(f"{share:.3f}" for share in shares), *each.speed.cells()])
    whole = sum((each.speed for each in found.values()), Speed())
    rows.append(["all", *[""] * (4 if reduced else 3), *whole.cells()])
    return rows


def show_report(found: dict[str, Drafting], name: str) -> None:
    """Print the table."""
    heading, *rows = report_rows(found)
    shown = Table(*heading, title=f"{name}: decoding", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def report_lines(found: dict[str, Drafting], settings: ReportSettings) -> list[str]:
    """A section for a card."""
    heading, *rows = report_rows(found)
    return [
        *("", "## Decoding", ""),
        f"Greedy decoding of {settings.report_prompts} test prompts of each shipped set, at most "
        f"{settings.report_tokens} tokens after each, {settings.report_draft_length} drafted a round, beside plain "
        "decoding; alpha, covered and greedy match are those at every token that plain decoding gave:",
        *("", *markdown(heading, rows), ""),
        "Overhead is the time of a round over that of a plain step; it and the speedup depend on the machine.",
    ]
