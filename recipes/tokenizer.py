"""Train the byte-level tokeniser of a family of models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specgym.decoding.fit.text.corpus_text import read_documents

from . import run

SEPARATOR = "<|endoftext|>"


@dataclass
class TokenizerSettings:
    """Train a byte-level BPE tokeniser on the training side of a corpus."""

    corpus: Path = Path("runs/corpus")
    """Folder of the corpus, as written by python -m recipes.corpus."""
    out: Path = Path("runs/tokenizer")
    """Folder to write; AutoTokenizer.from_pretrained reads it."""
    vocabulary: int = 4096
    """Number of tokens, the separator and the 256 bytes included."""


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser whose token 0, the separator, ends, begins and pads.

    Args:
        texts: documents to learn the merges from.
        vocabulary: number of tokens, at least 257.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocabulary, [SEPARATOR]),
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=1024,
        # Byte-level text comes back as it went in; tidying spaces would change code.
        clean_up_tokenization_spaces=False,
    )


def byte_level_bpe(texts: Iterable[str], vocabulary: int, special: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokeniser whose first tokens are the special ones.

    Args:
        texts: to learn the merges from.
        vocabulary: number of tokens, at least 256 and the special ones.
        special: tokens that no text becomes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_tokenizer(settings: TokenizerSettings) -> None:
    """Train the tokeniser.

    Raises:
        FileNotFoundError: there is no corpus.
    """
    texts = [passage.text for passage in read_documents(settings.corpus, "train")]
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    tokenizer.save_pretrained(settings.out)
    sample = texts[:: max(1, len(texts) // 500)]
    tokens = sum(len(ids) for ids in tokenizer(sample, verbose=False)["input_ids"])
    size = sum(len(text.encode()) for text in sample)
    Console().print(
        f"wrote {settings.out}: {len(tokenizer)} tokens, {size / tokens:.2f} bytes of training text a token"
    )


if __name__ == "__main__":
    run("tokenizer", TokenizerSettings, make_tokenizer)
