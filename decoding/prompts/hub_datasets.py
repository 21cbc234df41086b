"""Prompt texts from datasets on the Hugging Face hub, through the optional library ``datasets``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ..errors import SpecgymError

HUB_LIMIT = 512
_CHARACTERS = 2000  # of a document; the beginning of one is a prompt, the whole of it would fill any context


class DatasetError(SpecgymError, RuntimeError):
    """A hub dataset cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class HubSet:
    """Place of a dataset on the hub, and its column of text."""

    path: str
    config: str
    column: str
    train: str | None  # the dataset's own splits; None where it has but one
    test: str
    licence: str
    streamed: bool = False  # too large to download for a few hundred prompts


@dataclass(frozen=True)
class HubTexts:
    """Texts as they came; `train` is empty where the dataset has no such split."""

    train: list[str]
    test: list[str]
    source: str
    licence: str


HUB_SETS: dict[str, HubSet] = {
    "lambada": HubSet("EleutherAI/lambada_openai", "default", "text", None, "test", "MIT (modified)"),
    "wikitext": HubSet(
        "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "page", "train", "test", "CC BY-SA 3.0"
    ),
    "c4": HubSet("allenai/c4", "en", "text", "train", "validation", "ODC-BY 1.0", streamed=True),
}


def fetch_texts(name: str, limit: int = HUB_LIMIT) -> HubTexts:
    """The first texts of a hub dataset's splits, each cut to its first 2000 characters at a word's end.

    Args:
        name: a key of `HUB_SETS`.
        limit: at most so many texts a split. A dataset with one split gives four times as many, to be divided.

    Raises:
        DatasetError: the library is missing, the dataset cannot be reached, or it is not as expected.
    """
    spec = HUB_SETS[name]
    train = [] if spec.train is None else _texts(spec, spec.train, limit)
    test = _texts(spec, spec.test, limit if spec.train else 4 * limit)
    return HubTexts(train, test, f"{spec.path} ({spec.config})", spec.licence)


def _texts(spec: HubSet, split: str, most: int) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(
            f'the dataset {spec.path} needs the library "datasets": pip install "specgym[datasets]", or use a shipped '
            "prompt set or a file of your own"
        ) from error
    try:
        rows: Any = load_dataset(spec.path, spec.config, split=split, streaming=spec.streamed)
        taken = list(itertools.islice(rows, most))
    except Exception as error:  # network, hub and file-format errors of several libraries come through here
        raise DatasetError(
            f"the dataset {spec.path} ({spec.config}, {split}) cannot be loaded ({type(error).__name__}: {error}); "
            "check the network or HF_ENDPOINT, or save its texts to a .jsonl file and give that"
        ) from error
    texts = [row.get(spec.column) for row in taken]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DatasetError(
            f"the dataset {spec.path} has no text in a column {spec.column!r} of its split {split!r}: it has changed; "
            "save its texts to a .jsonl file and give that"
        )
    return [_beginning(text) for text in texts if text.strip()]


def _beginning(text: str) -> str:
    text = text.strip()
    if len(text) <= _CHARACTERS:
        return text
    head = text[:_CHARACTERS]
    return head.rsplit(maxsplit=1)[0] if any(character.isspace() for character in head) else head
