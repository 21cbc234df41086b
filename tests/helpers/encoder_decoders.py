"""Small encoder-decoders with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

KINDS = ("t5", "bart", "marian", "pegasus")
SOURCE = [5, 6, 7, 8, 9, 10, 11, 20, 30, 40, 5, 6, 7, 1]
_CLASSES: dict[str, tuple[Any, Any]] = {
    "bart": (BartConfig, BartForConditionalGeneration),
    "marian": (MarianConfig, MarianMTModel),
    "pegasus": (PegasusConfig, PegasusForConditionalGeneration),
}


def encoder_decoder(kind: str, *, layers: int = 2, vocabulary: int = 96, seed: int = 3, **more: Any) -> Any:
    """A small model of one of `KINDS`, in evaluation mode, whose logits never tie; it knows no end of text."""
    if kind == "t5":
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": layers, "num_heads": 4}
        settings: Any = {**shape, "relative_attention_max_distance": 20, **more}
        config: Any = T5Config(vocab_size=vocabulary, eos_token_id=None, pad_token_id=0, **settings)
        config.decoder_start_token_id = 0
        build: Any = T5ForConditionalGeneration
    else:
        make, build = _CLASSES[kind]
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": layers, **heads}
        widths = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 2}
        config = make(vocab_size=vocabulary, **{**shape, **widths, **ends, "forced_eos_token_id": None, **more})
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3 if kind == "t5" else 0.15)
        # Without what all hidden states have in common: otherwise a text would be one token over and over.
        room = getattr(config, "max_position_embeddings", 64)
        read: list[torch.Tensor] = []
        with model.lm_head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0])):
            model(
                input_ids=torch.tensor([SOURCE[:room]]) % vocabulary,
                decoder_input_ids=torch.randint(vocabulary, (1, min(64, room))),
            )
        common = torch.nn.functional.normalize(read[0].mean(0), dim=0)
        model.lm_head.weight -= (model.lm_head.weight @ common)[:, None] * common
    return model


def noisy_decoder(model: Any, noise: float = 0.1, of: str = "decoder") -> Any:
    """A draft with the same encoder that agrees often but not always: the decoder's weights have relative noise.

    Args:
        model: to be copied.
        noise: standard deviation, relative to the weights'.
        of: part of the names of the weights that get it.
    """
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in copied.named_parameters():
            if of in name and "embed" not in name:
                weight += noise * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return copied.eval()


def stock_tokens(model: Any, source: list[int] = SOURCE, **settings: Any) -> list[int]:
    """Tokens that greedy `generate()` writes after the start token."""
    tokens = torch.tensor([source])
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, num_beams=1, **settings)
    return list(output[0].tolist()[1:])


@torch.inference_mode()
def law_of(target: Any, source: Sequence[int]) -> dict[tuple[int, ...], float]:
    """Joint distribution of the first two tokens, by the model's own passes."""
    count = target.config.vocab_size
    texts = torch.tensor([[0, token] for token in range(count)])
    rows = target(input_ids=torch.tensor([source] * count), decoder_input_ids=texts).logits.double().softmax(-1)
    joint: Tensor = rows[0, 0][:, None] * rows[:, 1]
    return {(first, second): float(joint[first, second]) for first in range(count) for second in range(count)}
