"""Fit drafts, n-gram tables, Medusa and EAGLE heads and draft-tree networks to a target."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from ..errors import FitError, run_command
from .draft.distil import DraftSettings, make_draft
from .draft.ngram import NGramSettings, make_ngram
from .draft_tree.acceptance import AcceptanceSettings, make_acceptance
from .draft_tree.alignment import AlignmentSettings, make_alignment
from .eagle.heads import EagleSettings, make_eagle
from .medusa.heads import MedusaSettings, make_medusa
from .medusa.joint import JointSettings, make_joint

Command = (
    Annotated[DraftSettings, tyro.conf.subcommand("draft")]
    | Annotated[NGramSettings, tyro.conf.subcommand("ngram")]
    | Annotated[MedusaSettings, tyro.conf.subcommand("medusa")]
    | Annotated[JointSettings, tyro.conf.subcommand("medusa-joint")]
    | Annotated[EagleSettings, tyro.conf.subcommand("eagle")]
    | Annotated[AlignmentSettings, tyro.conf.subcommand("alignment")]
    | Annotated[AcceptanceSettings, tyro.conf.subcommand("acceptance")]
)
_RUN: dict[type, Callable[[Any], object]] = {
    DraftSettings: make_draft,
    NGramSettings: make_ngram,
    MedusaSettings: make_medusa,
    JointSettings: make_joint,
    EagleSettings: make_eagle,
    AlignmentSettings: make_alignment,
    AcceptanceSettings: make_acceptance,
}
_RECIPES = ("corpus", "tokenizer", "target", "prompts")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: words of the command line; by default those of this program.

    Raises:
        FitError: it is a recipe. Others as for the commands.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _RECIPES:
        raise FitError(
            f"{arguments[0]} makes what the package ships, and runs in a checkout of the repository alone: "
            f"python -m recipes.{arguments[0]}"
        )
    command = tyro.cli(Command, prog="python -m specgym.decoding.fit", description=__doc__, args=arguments)
    _RUN[type(command)](command)


if __name__ == "__main__":
    sys.exit(run_command(main, "The same command goes on from its last checkpoint."))
