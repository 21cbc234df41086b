"""Model cards and terminal reports of the fit commands, from one template."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from .loop import Outcome
from .settings import LoopSettings

Rows = Sequence[Sequence[str]]
"""A table of text cells: the heading, then the rows; a column of words, then columns of numbers."""

_CARDS = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
_TEMPLATE = """\
---
license: {{ facts.licence }}
library_name: specgym
pipeline_tag: text-generation
---

# {{ facts.name }}

{{ facts.summary }}

{{ facts.size }}. Stored {{ facts.stored_as }}.

{% if unfinished %}
**Training is still going on**: {{ "{:,}".format(unfinished) }} tokens so far.

{% endif %}
## Made by

```
{{ command }}
```

## Text

{% for line in facts.sources %}
- {{ line }}
{% endfor %}

## Training

{% for line in training %}
- {{ line }}
{% endfor %}
{% for section in sections %}

## {{ section.title }}
{% for part in section.parts %}

{{ part if part is string else markdown(part) }}
{% endfor %}
{% endfor %}
"""


@dataclass(frozen=True)
class Facts:
    """Contents of a card besides training and measurements.

    Attributes:
        name: name of the model.
        summary: a sentence or two about it.
        licence: licence of the weights.
        sources: lines on the text that it learned from.
        size: number of parameters, in words.
        stored_as: storage format of the weights, in words.
        program: module whose command line made it.
    """

    name: str
    summary: str
    licence: str
    sources: Sequence[str]
    size: str
    stored_as: str = "in float16"
    program: str = "specgym.decoding.fit"


@dataclass(frozen=True)
class Section:
    """A section of a card.

    Attributes:
        title: its heading.
        parts: paragraphs and tables, in order.
    """

    title: str
    parts: Sequence[str | Rows]


def size_of(module: nn.Module, shared: Mapping[str, str] | None = None, lender: str = "") -> str:
    """Number of parameters in words; tied ones count once, and ``shared`` names those that ``lender`` stores."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    lent = sum(sizes.get(name, 0) for name in shared or {})
    total = sum(sizes.values())
    words = f"{total / 1e6:.2f} million parameters"
    if lent:
        words += f", of which {(total - lent) / 1e6:.2f} million are stored here and the rest shared with {lender}"
    return words


def write_card(facts: Facts, outcome: Outcome | None, training: Sequence[str], sections: Sequence[Section]) -> str:
    """The text of a card.

    Args:
        facts: the model and its origin.
        outcome: totals of training; None if nothing was trained.
        training: lines on training.
        sections: measurements; empty while training goes on.
    """
    return _CARDS.from_string(_TEMPLATE).render(
        facts=facts,
        unfinished=outcome.tokens if outcome is not None and not sections else None,
        command=command_line(facts.program),
        training=training,
        sections=sections,
        markdown=markdown,
    )


def command_line(program: str = "specgym.decoding.fit") -> str:
    """The command that is running, as one would type it again in the same folder."""
    return shlex.join(["python", "-m", program, *map(portable, sys.argv[1:])])


def portable(argument: str) -> str:
    """An argument without folders of this machine: relative to the running folder, or the last name of a path."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    here = Path.cwd()
    return option + equals + (path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name)


def markdown(rows: Rows) -> str:
    """A table in Markdown."""
    heading, *cells = rows
    marks = ["---", *["--:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, marks, *cells))


def show(title: str, *parts: Rows | str) -> None:
    """Print tables and sentences."""
    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part)
            continue
        heading, *rows = part
        # Without vertical rules, wide tables fit into eighty columns.
        table = Table(*heading, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in rows:
            table.add_row(*row)
        console.print(table)


def training_lines(
    settings: LoopSettings,
    outcome: Outcome,
    unit: str,
    per_step: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Lines for a card on amount, optimiser, schedule and precision.

    Args:
        settings: how it was trained.
        outcome: totals of training.
        unit: the things that are trained on, in the plural.
        per_step: how many of them a step takes; by default the product of batch and length.
        dtype: type of the target's weights, for networks beside a target.
    """
    size = per_step or settings.batch * settings.length
    optimiser = "Muon for the layers' matrices and AdamW for the rest" if settings.optimiser == "muon" else "AdamW"
    precision = "bfloat16 autocast over float32 weights" if settings.bfloat16 else "float32"
    return [
        f"{outcome.steps * size:,} {unit} in {outcome.steps:,} steps of {size:,}, {outcome.seconds / 60:.0f} minutes "
        f"on {device_words(settings, dtype)}",
        f"{optimiser}, learning rate {settings.learning_rate:g}, warm-up {settings.warmup:g} of the run, cosine to a "
        f"twentieth; weight decay {settings.weight_decay:g}, gradient norm at most {settings.clip:g}",
        f"{precision}, seed {settings.seed}",
    ]


def device_words(settings: LoopSettings, dtype: torch.dtype | None = None) -> str:
    """Device of the training, and type of the target's weights if given, in words."""
    device = settings.torch_device()
    threads = f"{settings.threads} CPU thread{'s' * (settings.threads > 1)}" if settings.threads else "a CPU"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    target = "" if dtype is None else f", the target in {str(dtype).removeprefix('torch.')}"
    return f"{threads if device.type == 'cpu' else name}{target}"
