"""Texts of datasets on the hub, and the references that some have, through the optional library ``datasets``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SpecgymError

if TYPE_CHECKING:
    from ..prompts import Measure

HUB_LIMIT = 512
_CHARACTERS = 2000  # of a document; the beginning of one is a prompt, the whole of it would fill any context


class DatasetError(SpecgymError, RuntimeError):
    """A hub dataset cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class HubSet:
    """Place of a dataset on the hub, and its column of text or the path to it; of several turns the first."""

    path: str
    config: str
    column: str
    train: str | None  # the dataset's own splits; None where it has but one
    test: str
    licence: str
    streamed: bool = False  # too large to download for a few hundred prompts
    chat: bool = False
    reference: str = ""  # the column of what the text should become, or the path to it
    measure: Measure = "bleu"


class PromptItem(NamedTuple):
    """A prompt and its references, if there are any."""

    prompt: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubTexts:
    """Texts as they came; `train` is empty where the dataset has no such split."""

    train: list[PromptItem]
    test: list[PromptItem]
    source: str
    licence: str


HUB_SETS: dict[str, HubSet] = {
    "lambada": HubSet("EleutherAI/lambada_openai", "default", "text", None, "test", "MIT (modified)"),
    "wikitext": HubSet(
        "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "page", "train", "test", "CC BY-SA 3.0"
    ),
    "c4": HubSet("allenai/c4", "en", "text", "train", "validation", "ODC-BY 1.0", streamed=True),
    "cnn_dailymail": HubSet(
        "abisee/cnn_dailymail",
        "3.0.0",
        "article",
        "train",
        "test",
        "Apache 2.0",
        streamed=True,
        reference="highlights",
        measure="rouge",
    ),
    "gsm8k": HubSet("openai/gsm8k", "main", "question", "train", "test", "MIT", chat=True),
    "mt_bench": HubSet("HuggingFaceH4/mt_bench_prompts", "default", "prompt", None, "train", "Apache 2.0", chat=True),
    "openai_humaneval": HubSet("openai/openai_humaneval", "openai_humaneval", "prompt", None, "test", "MIT"),
    **{
        f"{year}-{source}-{other}": HubSet(
            f"wmt/{year}",
            "de-en",
            f"translation.{source}",
            "train",
            "test",
            "unknown",
            streamed=True,
            reference=f"translation.{other}",
        )
        for year in ("wmt14", "wmt16")
        for source, other in (("de", "en"), ("en", "de"))
    },
}


def fetch_texts(name: str, limit: int = HUB_LIMIT) -> HubTexts:
    """The first texts of a hub dataset's splits, each cut to 2000 characters at a word's end, and whole references.

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


def _texts(spec: HubSet, split: str, most: int) -> list[PromptItem]:
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
    texts = _column(spec, split, taken, spec.column)
    references = _column(spec, split, taken, spec.reference) if spec.reference else [None] * len(texts)
    return [
        PromptItem(_beginning(text), () if reference is None else (reference,))
        for text, reference in zip(texts, references, strict=True)
        if text.strip()
    ]


def _column(spec: HubSet, split: str, rows: list[Any], column: str) -> Sequence[str]:
    entries = [_entry(row, column) for row in rows]
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise DatasetError(
            f"the dataset {spec.path} has no text in a column {column!r} of its split {split!r}: it has changed; "
            "save its texts to a .jsonl file and give that"
        )
    return entries


def _entry(row: Any, path: str) -> Any:
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row[0] if isinstance(row, list) and row else row


def _beginning(text: str) -> str:
    if len(text) <= _CHARACTERS:
        return text
    head = text[:_CHARACTERS]
    return head.rsplit(maxsplit=1)[0] if any(character.isspace() for character in head.strip()) else head
