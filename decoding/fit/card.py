"""Model cards, written by the command that made the model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .loop import LoopSettings, Outcome, device_of
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
        compared: where a draft is compared with its target.
        stored_as: words for how weights are stored.
    """

    name: str
    summary: str
    parameters: int
    stored: int
    licence: str
    sources: Sequence[str]
    target: str | None = None
    compared: str = "at every position"
    stored_as: str = "in float16"


def command_line() -> str:
    """The command that is running, as one would type it again in the same folder; absolute paths are shortened."""
    return shlex.join(["python", "-m", "specgym.decoding.fit", *map(_portable, sys.argv[1:])])


def _portable(argument: str) -> str:
    """An argument without the places of one machine: a path in the running folder from there, another by its name."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    here = Path.cwd()
    return option + equals + (path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name)


def write_card(facts: Facts, settings: LoopSettings, outcome: Outcome, qualities: Mapping[str, Quality] | None) -> str:
    """The text of a model card.

    Args:
        facts: what the model is and comes from.
        settings: how it was trained.
        outcome: what training did.
        qualities: by domain; None while training goes on.
    """
    lines = opening(facts, outcome if qualities is None else None)
    lines += [
        *("", "## Training", ""),
        f"- {outcome.tokens:,} tokens in {outcome.steps:,} steps of {settings.batch} x {settings.length}, "
        f"{outcome.seconds / 60:.0f} minutes",
        f"- {_optimiser(settings)}, {schedule(settings)}",
        f"- {precision(settings)}, seed {settings.seed}",
        f"- loss on training text at the end: {outcome.loss:.3f} nats a token",
    ]
    if qualities is not None:
        heading, *rows = table(qualities)
        lines += ["", "## Held-out text", "", *markdown(heading, rows)]
        if facts.target is not None:
            lines += ["", f"KL, alpha and greedy match compare with {facts.target} {facts.compared}.", *_ALPHA]
        if "covered" in heading:
            lines += [
                f"The draft proposes some tokens only. Covered is the probability that {facts.target} gives to them,",
                "which alpha cannot exceed; KL compares with its distribution over them.",
            ]
    return "\n".join(lines) + "\n"


def opening(facts: Facts, outcome: Outcome | None) -> list[str]:
    """The lines of a card up to its sources.

    Args:
        facts: what the model is and comes from.
        outcome: what training has done so far; None when it has ended.
    """
    size = f"{facts.parameters / 1e6:.2f} million parameters"
    if facts.stored != facts.parameters:
        size += f", of which {facts.stored / 1e6:.2f} million are stored here and the rest shared with {facts.target}"
    lines = [
        *("---", f"license: {facts.licence}", "library_name: specgym", "pipeline_tag: text-generation", "---", ""),
        *(f"# {facts.name}", "", facts.summary, "", f"{size}. Stored {facts.stored_as}.", ""),
    ]
    if outcome is not None:
        lines += [f"**Training is still going on**: {outcome.tokens:,} tokens so far.", ""]
    lines += ["## Made by", "", "```", command_line(), "```", "", "## Text", ""]
    return lines + [f"- {line}" for line in facts.sources]


def schedule(settings: LoopSettings) -> str:
    """What the optimiser's steps are scaled by."""
    return (
        f"learning rate {settings.learning_rate:g}, warm-up {settings.warmup:g} of the run, cosine to a twentieth; "
        f"weight decay {settings.weight_decay:g}, gradient norm at most {settings.clip:g}"
    )


def precision(settings: LoopSettings) -> str:
    """What training computed in."""
    return "bfloat16 autocast over float32 weights" if settings.bfloat16 else "float32"


def where(settings: LoopSettings, dtype: torch.dtype) -> str:
    """What training ran on, and the type of the target's weights."""
    device, kind = device_of(settings), str(dtype).removeprefix("torch.")
    threads = f"{settings.threads} CPU thread{'s' * (settings.threads > 1)}" if settings.threads else "a CPU"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{threads if device.type == 'cpu' else name}, the target in {kind}"


def _optimiser(settings: LoopSettings) -> str:
    return "Muon for the layers' matrices and AdamW for the rest" if settings.optimiser == "muon" else "AdamW"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, its first column of words and the others of numbers."""
    marks = ["---", *["--:"] * (len(heading) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heading, marks, *rows)]
