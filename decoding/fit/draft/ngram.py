"""Count an n-gram table, a draft that costs next to nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...drafts.ngram import NGramDrafter, check_order
from ...errors import FitError
from ...files import write_text
from ...loading.find_model import load_tokenizer, vocabulary_rows
from ..cards import command_line, markdown, portable, show
from ..text.corpus_text import Passage, read_documents, read_plain

_PARTS = 64


@dataclass
class NGramSettings:
    """Count an n-gram table on text, for any target; it drafts the likeliest next token of the table."""

    target: str
    """Target model whose tokens are counted: a folder, a hub id or the name of a shipped model (only its tokenizer is
    loaded)."""
    out: Path
    """Table to write, ending in .safetensors; a card with the result goes beside it."""
    corpus: Path = Path("runs/corpus")
    """Folder of the corpus, as written by python -m recipes.corpus; not read with --text."""
    text: tuple[Path, ...] = ()
    """Text files, or folders of them, to count instead of the corpus; a twentieth is held out for the report."""
    order: int = 4
    """Tokens in the longest n-gram. With 4, any vocabulary is small enough; 5 goes up to 55,108 tokens."""
    smallest_count: int = 2
    """Leave out contexts of two tokens or more whose best continuation was seen less often; larger is smaller."""
    licence: str = "the licences of the texts it was counted on"
    """Licence for the card."""


def make_ngram(settings: NGramSettings) -> None:
    """Run the ``ngram`` command.

    Raises:
        FitError: the name of the table has another ending than .safetensors, or the order is too large for the target's
            vocabulary.
        FileNotFoundError: there is no text.
    """
    if settings.out.suffix != ".safetensors":
        raise FitError(f"--out {settings.out} must end in .safetensors, which is how load_pair knows a table")
    tokenizer = load_tokenizer(settings.target)
    vocabulary_size = vocabulary_rows(settings.target)
    try:
        check_order(settings.order, vocabulary_size)
    except ValueError as error:
        raise FitError(f"--order: {error}") from error
    if settings.text:
        plain = read_plain(settings.text)
        train = [passage for place, passage in enumerate(plain) if place % 20 != 19]
        held_out = plain[19::20]
    else:
        train, held_out = read_documents(settings.corpus, "train"), read_documents(settings.corpus, "held-out")

    def encode(passages: Sequence[Passage], label: str) -> list[list[int]]:
        ids: list[list[int]] = []
        size = max(1, len(passages) // _PARTS)
        for start in tqdm(range(0, len(passages), size), desc=label, unit="part"):
            texts = [passage.text for passage in passages[start : start + size]]
            ids += tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    documents = encode(train, "train")
    table = NGramDrafter.fit(documents, vocabulary_size, settings.order, settings.smallest_count)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    table.save(settings.out)
    judged = encode(held_out, "held out")
    matches = match_rates(table, zip((passage.domain for passage in held_out), judged, strict=True))
    rows = [["domain", "next token guessed"], *([domain, f"{rate:.3f}"] for domain, rate in matches.items())]
    show(f"{settings.out.name}: {len(table):,} contexts", rows)
    source = f"the corpus of `{portable(str(settings.corpus))}`, train side"
    if settings.text:
        source = ", ".join(portable(str(path)) for path in settings.text)
    write_text(
        settings.out.with_suffix(".md"),
        f"# {settings.out.stem}: an n-gram table\n\nMade by `{command_line()}` from {source} "
        f"({sum(map(len, documents)):,} tokens): {len(table):,} contexts.\n\n"
        f"Licence: {settings.licence}.\n\nShare of held-out tokens that are the table's likeliest continuation of the "
        f"tokens before them:\n\n{markdown(rows)}\n",
    )


def match_rates(
    table: NGramDrafter, documents: Iterable[tuple[str, Sequence[int]]], most_tokens: int = 20_000
) -> dict[str, float]:
    """By domain, the share of tokens that the table guesses from the true tokens before them.

    At most ``most_tokens`` of a domain are judged; documents are pairs of domain and token ids.
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
