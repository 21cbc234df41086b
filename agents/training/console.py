"""Shared rich console; silences third-party warnings and progress bars."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

console = Console()
if not console.is_terminal:
    console.width = 120  # a file or a pipe has no width, and the usual 80 would break lines for nothing


def tell_differences(differences: Sequence[str], path: Path, what: str) -> None:
    """Say where figures that were made again differ from those in a file, or that none does."""
    if not differences:
        console.print(f"All {what} equal those in {path}.", soft_wrap=True)
        return
    console.print(f"{len(differences)} {what} differ from {path} (another machine or version?):")
    for line in differences[:10]:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def quieten() -> None:
    """Keep other libraries' progress bars, hints and warnings off the terminal; this package's own come through.

    Environment variables carry it on to the processes that are started later.
    """
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|tensorboard|torch\.utils\.tensorboard|tqdm)(\.|$)")
    warnings.filterwarnings("ignore", message="You have specified a mini-batch size")  # the last one may be smaller
    ours = logging.getLogger("specgym")
    if not ours.handlers:
        ours.addHandler(RichHandler(console=console, show_path=False, show_time=False, markup=False))
        ours.setLevel(logging.INFO)
        ours.propagate = False
