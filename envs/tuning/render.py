"""Rendering of a step as coloured text: accepted draft tokens, those taken back, and the target's own."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from specgym.decoding import Pair, Round

ACCEPTED, TAKEN_BACK, TARGET = "green", "red strike", "bold blue"
_PROMPT_CHARACTERS = 160
_NOTHING = "nothing decoded yet"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render_step(
    pair: Pair | None,
    prompt: Sequence[int],
    rounds: Sequence[Round],
    *,
    title: str,
    knobs: Mapping[str, float],
    metrics: Mapping[str, float],
    marks: bool = False,
) -> Text:
    """Render the last step: prompt (dim), text in three colours, a legend, knobs and metrics.

    Args:
        pair: its tokenizer makes text of tokens; without a tokenizer, ids are shown. None for a replay, which has no
            text.
        prompt: token ids of the prompt; its last part is shown.
        rounds: of the generation, in order.
        title: begins the first line, for instance the workload's name.
        knobs: values by name.
        metrics: values by name, shown in order; none before the first step.
        marks: put [- -] round what was taken back, where colours will not be seen.
    """
    text = _heading(title, knobs, "" if pair else "replayed")
    if not metrics:
        return text.append(_NOTHING)
    if pair is not None:
        text.append_text(render_rounds(pair, prompt, rounds, marks=marks)).append("\n")
        text.append("draft, accepted", style=ACCEPTED).append("  ")
        text.append("[-taken back-]" if marks else "taken back", style=TAKEN_BACK).append("  ")
        text.append("the target's own", style=TARGET).append("\n")
    return text.append(_numbers(metrics))


def render_engine_step(
    prompt: str, generated: str, *, title: str, knobs: Mapping[str, float], metrics: Mapping[str, float]
) -> Text:
    """Render the last step of an engine, which does not tell its rounds: prompt (dim), text, knobs and metrics.

    Args:
        prompt: its last part is shown.
        generated: text that follows it.
        title: begins the first line.
        knobs: values by name.
        metrics: values by name, shown in order; none before the first step.
    """
    text = _heading(title, knobs)
    if not metrics:
        return text.append(_NOTHING)
    text.append(_shortened(_harmless(prompt)), style="dim").append(_harmless(generated)).append("\n")
    return text.append(_numbers(metrics))


def render_rounds(pair: Pair, prompt: Sequence[int], rounds: Iterable[Round], *, marks: bool = False) -> Text:
    """Render the end of the prompt and the generated tokens in colour; tokens taken back stand where they stood."""
    text = Text()
    text.append(_shortened(_piece(pair, [], prompt)), style="dim")
    shown = list(prompt)
    for round_ in rounds:
        accepted, of_target = round_.tokens[: round_.accepted], round_.tokens[round_.accepted :]
        text.append(_piece(pair, shown, accepted), style=ACCEPTED)
        shown += accepted
        if round_.taken_back:
            lost = _piece(pair, shown, round_.taken_back)
            text.append(f"[-{lost}-]" if marks else lost, style=TAKEN_BACK)
        text.append(_piece(pair, shown, of_target), style=TARGET)
        shown += of_target
    return text


def to_ansi(text: Text, width: int = 100) -> str:
    """Return the text with ANSI colour codes, wrapped at so many characters."""
    out = io.StringIO()
    # Every colour here is one of the eight that all terminals have.
    console = Console(file=out, force_terminal=True, color_system="standard", width=width, no_color=False)
    console.print(text, soft_wrap=False, highlight=False)
    return out.getvalue()


def print_step(text: Text, file: TextIO | None = None) -> None:
    """Print to a terminal, in colour if it shows any."""
    Console(file=file).print(text, highlight=False)


def shows_colour(file: TextIO | None = None) -> bool:
    """Return whether colours printed to a file (by default standard output) will be seen."""
    console = Console(file=file or sys.stdout)
    return console.is_terminal and not console.no_color


def _piece(pair: Pair, before: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text that some tokens add; alone, a token may lack its leading space."""
    if pair.tokenizer is None:
        return "".join(f"{int(token)} " for token in tokens)
    recent = list(before[-8:])
    start, whole = pair.decode(recent) or "", pair.decode([*recent, *tokens]) or ""
    added = whole[len(start) :] if whole.startswith(start) else pair.decode(tokens) or ""
    return _harmless(added)


def _harmless(text: str) -> str:
    """Text without control characters: a model must not steer the reader's terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _heading(title: str, knobs: Mapping[str, float], note: str = "") -> Text:
    text = Text().append(f"{title}  ", style="bold")
    if note:
        text.append(f"{note}  ", style="dim")
    return text.append(_numbers(knobs) + "\n")


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name}={value:.4g}" for name, value in values.items())


def _shortened(text: str) -> str:
    return text if len(text) <= _PROMPT_CHARACTERS else "…" + text[-_PROMPT_CHARACTERS:]
