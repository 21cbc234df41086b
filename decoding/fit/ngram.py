"""Count an n-gram table, to serve as a draft that costs next to nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..drafts.ngram import NGramDrafter
from ..files import write_text
from ..loading.find_model import load_tokenizer
from .text import read_documents, read_plain

_PARTS = 64


@dataclass
class NGramSettings:
    """Count an n-gram table on text, for any target; its draft is the table's likeliest next token."""

    target: str
    """The target whose tokens are counted: a folder, a hub id or a shipped model (only its tokenizer is loaded)."""
    out: Path
    """The table to write, ending in .safetensors; a card with the result goes beside it."""
    corpus: Path = Path("runs/corpus")
    """Folder written by the corpus command; not read when --text is given."""
    text: tuple[Path, ...] = ()
    """Text files, or folders of them, to count instead of the corpus; a twentieth is held out for the report."""
    order: int = 4
    """Tokens in the longest n-gram."""
    smallest_count: int = 2
    """Leave out contexts of two tokens or more whose best continuation was seen less often; larger is smaller."""
    licence: str = "the licences of the texts it was counted on"
    """What the card says of the licence."""


def make_ngram(settings: NGramSettings) -> None:
    """Run the ``ngram`` command."""
    if settings.out.suffix != ".safetensors":
        raise ValueError(f"--out {settings.out} must end in .safetensors, which is how load_pair knows a table")
    tokenizer = load_tokenizer(settings.target)
    if settings.text:
        plain = read_plain(settings.text)
        train = [row for place, row in enumerate(plain) if place % 20 != 19]
        held_out = [row for place, row in enumerate(plain) if place % 20 == 19]
    else:
        train = read_documents(settings.corpus, "train")
        held_out = read_documents(settings.corpus, "held-out")

    def encode(rows: Sequence[tuple[str, str, str]], label: str) -> list[list[int]]:
        ids: list[list[int]] = []
        size = max(1, len(rows) // _PARTS)
        for start in tqdm(range(0, len(rows), size), desc=label, unit="part"):
            texts = [text for _, _, text in rows[start : start + size]]
            ids += tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    documents = encode(train, "train")
    table = NGramDrafter.fit(documents, len(tokenizer), settings.order, settings.smallest_count)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    table.save(settings.out)

    judged = encode(held_out, "held out")
    matches = match_rates(table, zip((domain for domain, _, _ in held_out), judged, strict=True))
    report = Table("domain", "next token guessed", title=f"{settings.out.name}: {len(table):,} contexts")
    for domain, rate in matches.items():
        report.add_row(domain, f"{rate:.1%}")
    Console().print(report)
    rows = "\n".join(f"| {domain} | {rate:.3f} |" for domain, rate in matches.items())
    source = " ".join(map(str, settings.text)) if settings.text else f"the corpus of `{settings.corpus}`, train side"
    write_text(
        settings.out.with_suffix(".md"),
        f"# {settings.out.stem}: an n-gram table\n\nMade by `python -m specgym.decoding.fit ngram --target "
        f"{settings.target} --out {settings.out} --order {settings.order} --smallest-count "
        f"{settings.smallest_count}` from {source} ({sum(map(len, documents)):,} tokens): {len(table):,} contexts.\n\n"
        f"Licence: {settings.licence}.\n\nShare of held-out tokens that are the table's likeliest continuation of the "
        f"tokens before them:\n\n| domain | guessed |\n|---|---|\n{rows}\n",
    )


def match_rates(
    table: NGramDrafter, documents: Iterable[tuple[str, Sequence[int]]], most_tokens: int = 20_000
) -> dict[str, float]:
    """By domain, the share of tokens that the table guesses from the true tokens before them.

    Args:
        table: to be judged.
        documents: (domain, token ids).
        most_tokens: judge at most so many tokens of each domain.
    """
    hits: dict[str, int] = defaultdict(int)
    seen: dict[str, int] = defaultdict(int)
    for domain, ids in documents:
        for place in range(1, len(ids)):
            if seen[domain] >= most_tokens:
                break
            seen[domain] += 1
            hits[domain] += table.next_token(ids[max(0, place - 8) : place]) == ids[place]
    return {domain: hits[domain] / seen[domain] for domain in seen}
