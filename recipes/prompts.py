"""Cut prompt sets from held-out documents, which no model of the family has seen."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specgym.decoding.errors import FitError
from specgym.decoding.fit.text.corpus_text import read_documents, unit_hash
from specgym.decoding.prompts import FORMAT
from specgym.decoding.sealed_files import write_sealed

from . import run

# Only sources whose text may be passed on in a package of another licence; FOLDOC's may not.
_FROM = {"prose": "bible/", "code": "python/", "definitions": "jargon/"}
_DESCRIPTIONS = {
    "prose": "Passages of the King James Bible, to be continued.",
    "code": "Functions and classes of Python's standard library, cut at a line border, to be continued.",
    "definitions": "Beginnings of entries of the Jargon File, to be continued.",
}
_LICENCES = {"prose": "public domain", "code": "PSF-2.0", "definitions": "public domain"}
# Addresses of people have no place in a prompt, nor do drawings and coarse words, of which the sources have some.
_UNFIT = re.compile(
    r"\S@\S+\.\S|https?:|_{4}|[|/\\]{3}|-{5}|\bf\*?u?ck|\bshit|\bsex|carnal|whore|harlot|\brap(?:e|ist)\b",
    re.IGNORECASE,
)
_STARTS = re.compile(r"^ *(?:async def|def|class) ", re.MULTILINE)


@dataclass
class PromptSettings:
    """Cut prompt sets for training and testing a tuner from the held-out documents of a corpus.

    The two sides of a set come from different documents, and both only from documents that no model was trained on.
    """

    corpus: Path = Path("runs/corpus")
    """Folder of the corpus, as written by python -m recipes.corpus."""
    tokenizer: Path = Path("runs/tokenizer")
    """Folder of the tokeniser, as written by python -m recipes.tokenizer; lengths are counted with it."""
    out: Path = Path("runs/prompts")
    """Folder to write, with a JSON file for every domain."""
    train: int = 40
    """Prompts for training."""
    test: int = 32
    """Prompts for testing."""
    shortest: int = 32
    """Fewest tokens of a prompt."""
    longest: int = 96
    """Most tokens of a prompt."""
    seed: int = 0
    """Seed of the choice."""


def cut_prompts(domain: str, text: str, count: Callable[[str], int], lengths: tuple[int, int], seed: str) -> list[str]:
    """Prompts that can be cut from one document, in a random but fixed order.

    Args:
        domain: ``code`` starts at definitions and ends lines, ``definitions`` starts with the document; anything else
            (prose) starts at lines.
        text: the document.
        count: the number of tokens of a text.
        lengths: fewest and most tokens.
        seed: of the order and of the lengths.
    """
    rng = random.Random(seed)
    if domain == "definitions":
        starts = [0]
    elif domain == "code":
        starts = [match.start() for match in _STARTS.finditer(text)]
    else:
        # The first two lines are a title and an empty one.
        starts = [match.end() for match in re.finditer("\n", text)][1:]
    rng.shuffle(starts)
    cut, used = list[str](), list[range]()
    for start in starts:
        border = re.compile(r"\n" if domain == "code" else r"\s+")
        most = rng.randint(*lengths)
        # Every token has at least one character, and ours have a little over three.
        ends = [match.start() for match in border.finditer(text, start + 1, start + 8 * most)]
        fitting = [end for end in ends if lengths[0] <= count(text[start:end].strip("\n")) <= most]
        if not fitting:
            continue
        prompt, span = text[start : fitting[-1]].rstrip().strip("\n"), range(start, fitting[-1])
        enough_left = len(text) - fitting[-1] >= 100
        apart = all(span.stop <= other.start or other.stop <= span.start for other in used)
        if enough_left and apart and not _UNFIT.search(prompt):
            cut.append(prompt)
            used.append(span)
    return cut


def choose(candidates: dict[str, list[str]], number: int) -> list[str]:
    """``number`` different prompts, taken from the documents in turn.

    Args:
        candidates: the prompts of every document; the order of both counts.
        number: prompts to take.

    Raises:
        FitError: if there are not enough.
    """

    def in_turn() -> Iterator[str]:
        for place in range(max(map(len, candidates.values()), default=0)):
            for prompts in candidates.values():
                if place < len(prompts):
                    yield prompts[place]

    chosen = list(dict.fromkeys(in_turn()))[:number]
    if len(chosen) < number:
        raise FitError(f"the held-out text gives only {len(chosen)} prompts of {number}: make a larger corpus")
    return chosen


def make_prompts(settings: PromptSettings) -> None:
    """Cut the prompt sets.

    Raises:
        FileNotFoundError: if there is no corpus.
        FitError: if its held-out side is too small.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(settings.tokenizer)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    manifest = json.loads((settings.corpus / "corpus.json").read_text(encoding="utf-8"))
    documents = read_documents(settings.corpus, "held-out")
    share = settings.train / (settings.train + settings.test)
    for domain, origin in _FROM.items():
        sides: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
        # Some passages come twice, for example in modules that were copied from one another.
        seen = "\n".join(text for other, _, text in read_documents(settings.corpus, "train") if other == domain)
        members = [(name, text) for other, name, text in documents if other == domain and name.startswith(origin)]
        members.sort(key=lambda member: unit_hash(member[0], f"prompts {settings.seed}"))
        for place, (name, text) in enumerate(members):
            prompts = cut_prompts(domain, text, count, (settings.shortest, settings.longest), f"{settings.seed}/{name}")
            side = "train" if place < share * len(members) else "test"
            sides[side][f"{place}/{name}"] = [prompt for prompt in prompts if prompt not in seen]
        chosen = {side: choose(sides[side], getattr(settings, side)) for side in sides}
        value = {
            "format": FORMAT,
            "name": domain,
            "description": _DESCRIPTIONS[domain],
            "source": _source(manifest[domain]["source"], domain),
            "licence": _LICENCES[domain],
            **chosen,
        }
        write_sealed(settings.out / f"{domain}.json", value)
        Console().print(f"wrote {settings.out / domain}.json: {settings.train} + {settings.test} prompts")


def _source(note: str, domain: str) -> str:
    """The part of a corpus's note that a prompt set draws on, without its licence."""
    parts = note.split("; ")
    if domain == "definitions":
        parts = [part for part in parts if part.startswith("Jargon")] or parts
    return parts[0].partition(", public")[0]


if __name__ == "__main__":
    run("prompts", PromptSettings, make_prompts)
