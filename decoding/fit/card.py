"""Model cards, written by the command that made the model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .loop import LoopSettings, Outcome
from .measure import Quality, table

_ALPHA = (
    "Alpha is the mean of the sum over tokens of min(target, draft) at temperature 1: the chance that a token drafted",
    "there is accepted.",
)


@dataclass(frozen=True)
class Facts:
    """What a card says besides the measurements.

    Attributes:
        name: of the model.
        summary: a sentence or two on what it is.
        parameters: number of parameters, shared ones included.
        stored: number of parameters stored in the folder.
        licence: of the weights.
        sources: lines on the text.
        target: name of the target, for a draft.
    """

    name: str
    summary: str
    parameters: int
    stored: int
    licence: str
    sources: Sequence[str]
    target: str | None = None


def command_line() -> str:
    """The command that is running, as one would type it again."""
    return shlex.join(["python", "-m", "specgym.decoding.fit", *sys.argv[1:]])


def write_card(facts: Facts, settings: LoopSettings, outcome: Outcome, qualities: Mapping[str, Quality] | None) -> str:
    """The text of a model card.

    Args:
        facts: what the model is and comes from.
        settings: how it was trained.
        outcome: what training did.
        qualities: by domain; None while training goes on.
    """
    size = f"{facts.parameters / 1e6:.2f} million parameters"
    if facts.stored != facts.parameters:
        size += f", of which {facts.stored / 1e6:.2f} million are stored here and the rest shared with {facts.target}"
    lines = [
        *("---", f"license: {facts.licence}", "library_name: specgym", "pipeline_tag: text-generation", "---", ""),
        *(f"# {facts.name}", "", facts.summary, "", f"{size}. Stored in float16.", ""),
    ]
    if qualities is None:
        lines += [f"**Training is still going on**: {outcome.tokens:,} tokens so far.", ""]
    lines += ["## Made by", "", "```", command_line(), "```", "", "## Text", ""]
    lines += [f"- {line}" for line in facts.sources]
    lines += [
        *("", "## Training", ""),
        f"- {outcome.tokens:,} tokens in {outcome.steps:,} steps of {settings.batch} x {settings.length}, "
        f"{outcome.seconds / 60:.0f} minutes",
        f"- {_optimiser(settings)}, learning rate {settings.learning_rate:g}, warm-up {settings.warmup:g} of the run, "
        f"cosine to a twentieth; weight decay {settings.weight_decay:g}, gradient norm at most {settings.clip:g}",
        f"- {'bfloat16 autocast over float32 weights' if settings.bfloat16 else 'float32'}, seed {settings.seed}",
        f"- loss on training text at the end: {outcome.loss:.3f} nats a token",
    ]
    if qualities is not None:
        heading, *rows = table(qualities)
        lines += ["", "## Held-out text", "", *_markdown(heading, rows)]
        if facts.target is not None:
            lines += ["", f"KL, alpha and greedy match compare with {facts.target} at every position.", *_ALPHA]
    return "\n".join(lines) + "\n"


def _optimiser(settings: LoopSettings) -> str:
    return "Muon for the layers' matrices and AdamW for the rest" if settings.optimiser == "muon" else "AdamW"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---", *["--:"] * (len(heading) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heading, marks, *rows)]
