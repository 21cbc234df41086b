"""Quality of a model on held-out text, and speed of a decoder compared with plain decoding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from ..decoder import Decoder
from ..decoders.autoregressive import AutoregressiveDecoder
from ..errors import FitError
from ..models.output_layer import reduced_output
from ..rounds import Generation


@dataclass(frozen=True)
class Quality:
    """Measurements over the positions of held-out text.

    Attributes:
        tokens: number of positions.
        perplexity: perplexity of the text under the model; nan if the model cannot propose every token.
        kl: mean KL divergence from the target's distribution to the draft's, in nats; nan without a target. For a draft
            that cannot propose every token, from the target's distribution over those that it can propose.
        alpha: mean over positions of sum over tokens of min(target, draft): the chance that a token drafted at
            temperature 1 is accepted; nan without a target.
        greedy_match: share of positions where target and draft have the same most likely token; nan without a target.
        covered: mean probability that the target gives to the tokens which the draft can propose, an upper bound of
            alpha; nan if it can propose all, and without a target.
    """

    tokens: int
    perplexity: float
    kl: float = math.nan
    alpha: float = math.nan
    greedy_match: float = math.nan
    covered: float = math.nan


def windows_of(tokens: np.ndarray, length: int, limit: int) -> torch.Tensor:
    """Evenly spread windows of a row of tokens; int64, shape (n, m + 1) with m = ``length``, less if the row is short.

    All windows together have at most ``limit`` tokens.

    Raises:
        FitError: if there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise FitError("held-out text is empty: give more text")
    length = min(length, len(tokens) - 1)
    count = max(1, min(limit // length, (len(tokens) - 1) // length))
    starts = np.linspace(0, len(tokens) - 1 - length, count).astype(np.int64)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))


@torch.inference_mode()
def measure(
    model: nn.Module,
    windows: torch.Tensor,
    target: nn.Module | None = None,
    batch: int = 4,
    counted: torch.Tensor | None = None,
    sources: Sequence[Sequence[int]] | None = None,
) -> Quality:
    """Measure a model, as a draft for ``target`` if there is one.

    Args:
        model: maps ``input_ids`` (b, m), or what else `reading` gives, to an output with ``logits`` (b, m, vocabulary).
        windows: int64, shape (n, m + 1).
        target: the model it drafts for, over the same vocabulary.
        batch: windows at a time.
        counted: tokens of the windows, without the first of each, that count, shape (n, m), bool; all by default.
        sources: what an encoder reads before each window.
    """
    device = next(model.parameters()).device
    reduced = reduced_output(model)
    chosen = torch.ones_like(windows[:, 1:], dtype=torch.bool) if counted is None else counted
    nats = kl = alpha = match = covered = 0.0
    parts = zip(windows.to(device).split(batch), chosen.to(device).split(batch), strict=True)
    for number, (part, these) in enumerate(parts):
        inputs = reading(part[:, :-1], None if sources is None else sources[number * batch : (number + 1) * batch])
        log_q = _log_probabilities(model, inputs)[these]
        nats += functional.nll_loss(log_q, part[:, 1:][these], reduction="sum").item()
        if target is not None:
            log_p = _log_probabilities(target, inputs)[these]
            alpha += torch.minimum(log_p, log_q).exp().sum().item()
            match += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            if reduced is not None:
                log_q, log_p = log_q[:, reduced.tokens], log_p[:, reduced.tokens]
                covered += log_p.exp().sum().item()
                log_p = log_p.log_softmax(-1)
            kl += functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
    count = int(chosen.sum())
    perplexity = math.nan if reduced is not None else math.exp(min(700.0, nats / count))
    if target is None:
        return Quality(count, perplexity)
    share = math.nan if reduced is None else covered / count
    return Quality(count, perplexity, kl / count, alpha / count, match / count, share)


def _log_probabilities(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits.float().log_softmax(-1)


def reading(ids: torch.Tensor, sources: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """Arguments of a pass over texts.

    Args:
        ids: the texts, int64, shape (n, m).
        sources: token ids of what an encoder reads before each; None for a model without one.
    """
    if sources is None:
        return {"input_ids": ids}
    rows = [torch.tensor(source) for source in sources]
    read = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(ids.device)
    return {"input_ids": read.clamp(min=0), "attention_mask": (read >= 0).long(), "decoder_input_ids": ids}


def measure_continuations(
    model: nn.Module,
    target: nn.Module,
    tokens: np.ndarray,
    prompts: np.ndarray,
    ends: np.ndarray,
    batch: int = 4,
    sources: Sequence[Sequence[int]] | None = None,
) -> Quality:
    """`measure` at the tokens, shape (n, width), behind prompts of these lengths, shape (n,), up to the ends."""
    places = np.arange(1, tokens.shape[1])
    written = (places >= prompts[:, None]) & (places < ends[:, None])
    ids = torch.from_numpy(tokens.astype(np.int64))
    return measure(model, ids, target, batch, torch.from_numpy(written), sources)


def measure_domains(
    model: nn.Module, held_out: Mapping[str, np.ndarray], target: nn.Module | None = None, limit: int = 32_768
) -> dict[str, Quality]:
    """`measure` for each domain, on windows of at most 512 tokens, at most ``limit`` tokens of each."""
    length = min(512, *(context_of(part) for part in (model, target) if part is not None))
    rows = tqdm(sorted(held_out.items()), unit="domain", mininterval=5.0, desc="held-out text")
    return {domain: measure(model, windows_of(row, length, limit), target) for domain, row in rows}


def context_of(model: nn.Module) -> int:
    """The longest sequence a model declares, in tokens; a very large number if it declares none."""
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31


def quality_rows(qualities: Mapping[str, Quality]) -> list[list[str]]:
    """A table by domain, heading first, without columns that have no numbers."""
    columns = {
        "perplexity": ("perplexity", ".2f"),
        "KL (nats)": ("kl", ".3f"),
        "alpha": ("alpha", ".3f"),
        "greedy match": ("greedy_match", ".3f"),
        "covered": ("covered", ".3f"),
    }
    kept = {
        heading: column
        for heading, column in columns.items()
        if not all(math.isnan(getattr(quality, column[0])) for quality in qualities.values())
    }
    rows = [["domain", "held-out tokens", *kept]]
    for domain, quality in qualities.items():
        numbers = (format(getattr(quality, name), digits) for name, digits in kept.values())
        rows.append([domain, f"{quality.tokens:,}", *numbers])
    return rows


@dataclass(frozen=True)
class Speed:
    """Sums over greedy generations by two decoders; seconds are those of rounds, without reading prompts.

    Attributes:
        tokens: tokens generated by the decoder in question.
        rounds: its rounds.
        seconds: its time.
        plain_tokens: tokens generated by autoregressive decoding.
        plain_seconds: its time.
    """

    tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0
    plain_tokens: int = 0
    plain_seconds: float = 0.0

    @classmethod
    def of(cls, generation: Generation, plain: Generation) -> Speed:
        """The sums over one prompt."""
        rounds = len(generation.rounds)
        return cls(len(generation.tokens), rounds, generation.seconds, len(plain.tokens), plain.seconds)

    def __add__(self, other: Speed) -> Speed:
        return Speed(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round emits, the target's own included."""
        return self.tokens / self.rounds

    @property
    def ms_per_token(self) -> float:
        """Milliseconds a token."""
        return 1000 * self.seconds / self.tokens

    @property
    def plain_ms_per_token(self) -> float:
        """Milliseconds a token of autoregressive decoding, and so of one of its steps."""
        return 1000 * self.plain_seconds / self.plain_tokens

    @property
    def overhead(self) -> float:
        """Time of a round over that of a plain step."""
        return 1000 * self.seconds / self.rounds / self.plain_ms_per_token

    @property
    def speedup(self) -> float:
        """Time a token of plain decoding over that of the decoder in question."""
        return self.plain_ms_per_token / self.ms_per_token


SPEED_HEADING = ("tokens a round", "overhead of a round", "ms a token", "plain ms a token", "speedup")
SPEED_NOTE = "Overhead is the time of a round over that of a plain step; it and the speedup depend on the machine."


def speed_rows(label: str, by_name: Mapping[str, Speed]) -> list[list[str]]:
    """A table of speeds and their sum, heading first."""
    names = ("tokens_per_round", "overhead", "ms_per_token", "plain_ms_per_token", "speedup")
    whole = sum(by_name.values(), Speed())
    cells = ([name, *(f"{getattr(speed, n):.2f}" for n in names)] for name, speed in {**by_name, "all": whole}.items())
    return [[label, *SPEED_HEADING], *cells]


def compare(
    decoder: Decoder, knobs: Mapping[str, float], prompts: Mapping[str, Sequence[Sequence[int]]], new_tokens: int
) -> Iterator[tuple[str, Generation, Generation]]:
    """Generate greedily from the same prompts by a decoder and by plain decoding, taking turns to be first.

    Args:
        decoder: the decoder in question.
        knobs: its knobs.
        prompts: token ids, by domain.
        new_tokens: most tokens after each prompt.

    Yields:
        For each prompt its domain, the text of the decoder, and that of plain decoding.
    """
    plain = AutoregressiveDecoder(decoder.pair)
    both: list[tuple[Decoder, Mapping[str, float]]] = [(plain, {}), (decoder, knobs)]
    for warm, values in both:
        warm.generate(next(iter(prompts.values()))[0], max_new_tokens=min(8, new_tokens), knobs=values)
    turn = itertools.count()
    for domain, rows in prompts.items():
        for row in tqdm(rows, unit="prompt", mininterval=5.0, desc=f"speed, {domain}"):
            order = both if next(turn) % 2 == 0 else both[::-1]
            texts = {which: which.generate(row, max_new_tokens=new_tokens, knobs=values) for which, values in order}
            yield domain, texts[decoder], texts[plain]
