"""``python -m specgym.decoding.fit <command>``: make text, tokenisers, models, what guides decoding, and prompts."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from ..errors import SpecgymError
from .acceptance import AcceptanceSettings, make_acceptance
from .alignment import AlignmentSettings, make_alignment
from .corpus import CorpusSettings, make_corpus
from .draft import DraftSettings, make_draft
from .joint import JointSettings, make_joint
from .medusa import MedusaSettings, make_medusa
from .ngram import NGramSettings, make_ngram
from .prompts import PromptSettings, make_prompts
from .target import TargetSettings, make_target
from .tokenizer import TokenizerSettings, make_tokenizer

Command = (
    Annotated[CorpusSettings, tyro.conf.subcommand("corpus")]
    | Annotated[TokenizerSettings, tyro.conf.subcommand("tokenizer")]
    | Annotated[TargetSettings, tyro.conf.subcommand("target")]
    | Annotated[DraftSettings, tyro.conf.subcommand("draft")]
    | Annotated[MedusaSettings, tyro.conf.subcommand("medusa")]
    | Annotated[JointSettings, tyro.conf.subcommand("medusa-joint")]
    | Annotated[AlignmentSettings, tyro.conf.subcommand("alignment")]
    | Annotated[AcceptanceSettings, tyro.conf.subcommand("acceptance")]
    | Annotated[NGramSettings, tyro.conf.subcommand("ngram")]
    | Annotated[PromptSettings, tyro.conf.subcommand("prompts")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command, given as on the command line."""
    command = tyro.cli(Command, prog="python -m specgym.decoding.fit", description=__doc__, args=arguments)
    match command:
        case CorpusSettings():
            make_corpus(command)
        case TokenizerSettings():
            make_tokenizer(command)
        case TargetSettings():
            make_target(command)
        case DraftSettings():
            make_draft(command)
        case MedusaSettings():
            make_medusa(command)
        case JointSettings():
            make_joint(command)
        case AlignmentSettings():
            make_alignment(command)
        case AcceptanceSettings():
            make_acceptance(command)
        case NGramSettings():
            make_ngram(command)
        case PromptSettings():
            make_prompts(command)


if __name__ == "__main__":
    try:
        main()
    except (SpecgymError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
