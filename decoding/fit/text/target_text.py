"""Text that a target writes or reads, for heads and drafts to learn from; stored in parts and reused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ...errors import FitError
from ...files import replacing
from ...loading.pair import Pair
from ...models.encoder.encoder_decoder import has_encoder, start_token
from ...models.identity import weights_digest
from ..measure import context_of
from ..settings import OwnTextSettings, TextSettings, require_least
from .corpus_text import POSITIONS, TEXTS, require_batch
from .prompts import TRAINING, Prompts, cut_prompts

_OF_DECODERS = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")
"""Settings of generation without which a decoder beside an encoder writes something else, or in another language."""


@dataclass(frozen=True)
class TargetText:
    """Texts that a target wrote after prompts, or that it only reads.

    Attributes:
        tokens: a prompt, its continuation, then zeros in each row; shape (n, width), int32.
        prompts: tokens of each prompt, shape (n,), int64; 0 for a text that counts as a whole.
        ends: tokens of each prompt and continuation together, shape (n,), int64.
        domain: index of each row's domain in ``domains``, shape (n,), int64.
        side: purpose of each row, `TRAINING`, `JUDGING` or `SPEED`, shape (n,), int64.
        domains: names.
        digest: hash of everything that the text depends on, 64 hex digits.
        folder: folder of the text and of what is computed from it.
        sources: token ids of what the target's encoder read before each text; None without an encoder. The prompt of
            such a text is the token with which all begin.
    """

    tokens: np.ndarray
    prompts: np.ndarray
    ends: np.ndarray
    domain: np.ndarray
    side: np.ndarray
    domains: tuple[str, ...]
    digest: str
    folder: Path
    sources: Sequence[Sequence[int]] | None = None

    def count(self, side: int) -> int:
        """Number of texts of one side."""
        return int((self.side == side).sum())

    def sources_of(self, rows: np.ndarray) -> list[Sequence[int]] | None:
        """Sources of some texts by their numbers, shape (n,); None without an encoder."""
        return None if self.sources is None else [self.sources[row] for row in rows.tolist()]

    def written(self) -> np.ndarray:
        """All tokens that the target wrote in texts to train on, shape (n,), int32."""
        places = np.arange(self.tokens.shape[1])
        chosen = (places >= self.prompts[:, None]) & (places < self.ends[:, None])
        return self.tokens[chosen & (self.side == TRAINING)[:, None]]


def join_texts(parts: Sequence[TargetText]) -> TargetText:
    """Several texts as one, with the rows of the first part first, stored where the first part is.

    Domains of the same name become one.
    """
    domains = tuple(dict.fromkeys(name for part in parts for name in part.domains))
    width = max(part.tokens.shape[1] for part in parts)
    rows = [np.pad(part.tokens, ((0, 0), (0, width - part.tokens.shape[1]))) for part in parts]
    places = [np.array([domains.index(name) for name in part.domains])[part.domain] for part in parts]
    return TargetText(
        tokens=np.concatenate(rows),
        prompts=np.concatenate([part.prompts for part in parts]),
        ends=np.concatenate([part.ends for part in parts]),
        domain=np.concatenate(places),
        side=np.concatenate([part.side for part in parts]),
        domains=domains,
        digest=hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest(),
        folder=parts[0].folder,
        sources=None if parts[0].sources is None else [row for part in parts for row in part.sources or ()],
    )


def frequent_tokens(tokens: np.ndarray, count: int, vocabulary_size: int | None = None) -> tuple[int, ...]:
    """The most frequent tokens of a text, shape (n,), ascending; none if ``count`` is 0.

    With a vocabulary size, a text of too few different tokens is topped up with the lowest token numbers, which a byte-
    pair tokeniser gives to its most frequent tokens; without it the result may be shorter.
    """
    times = np.bincount(tokens, minlength=vocabulary_size or 0)
    likeliest = np.argsort(-times, kind="stable")  # among equally frequent tokens the lowest number comes first
    if vocabulary_size is None:
        likeliest = likeliest[times[likeliest] > 0]
    return tuple(sorted(map(int, likeliest[:count])))


def describe_text(settings: TextSettings, target: str) -> str:
    """A line for a card on text that ``target`` generated, after those on the origin of the prompts."""
    return (
        f"{target} itself continued {settings.texts:,} prompts of {max(2, settings.prompt_tokens // 2)} to "
        f"{settings.prompt_tokens} tokens cut from that text by at most {settings.new_tokens} tokens, at temperature "
        f"{settings.temperature:g}; a tenth of the prompts was held out"
    )


def describe_texts(settings: TextSettings, target: str) -> str:
    """A line for a card on texts that ``target``, which has an encoder, wrote after sources."""
    return (
        f"{target} itself wrote a text of at most {settings.new_tokens} tokens after each source, at temperature "
        f"{settings.temperature:g}; a tenth of the sources was held out"
    )


def check_text_settings(settings: TextSettings, model: PreTrainedModel, least_new_tokens: int) -> None:
    """Refuse settings that cannot work for a model that writes or reads the text, before anything is generated.

    Raises:
        FitError: a setting is out of range, or a prompt and its continuation exceed the context of the model.
    """
    require_least(settings, prompt_tokens=2, new_tokens=least_new_tokens)
    if settings.width > context_of(model):
        raise FitError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} are together more than "
            f"the model's context of {context_of(model)} tokens"
        )


def own_text(
    settings: OwnTextSettings, pair: Pair, name: str, least_new_tokens: int, whole: bool = False
) -> tuple[TargetText, Prompts]:
    """Cut prompts and let the target continue them, or read the text that an earlier call stored.

    Args:
        settings: which text, seed, size of a batch, and folder for the text.
        pair: the target, with its tokeniser and weights that are not prepacked.
        name: name of the target, for cards.
        least_new_tokens: shortest continuation from which anything can be learnt.
        whole: a step takes whole texts instead of positions.

    Returns:
        The text, and its prompts with a description of the text among their sources.

    Raises:
        FileNotFoundError: there is nothing to cut prompts from.
        FitError: a setting is out of range, or there is too little text.
    """
    assert pair.tokenizer is not None
    model, how, loop = pair.target.model, settings.own_text, settings.loop
    check_text_settings(how, model, least_new_tokens)
    prompts = cut_prompts(pair.tokenizer, settings.corpus, settings.text, how.texts, how.prompt_tokens, loop.seed)
    count = prompts.count(TRAINING)
    if whole:
        require_batch(count, loop.batch, TEXTS)
    else:
        require_batch(how.new_tokens * count, loop.batch * loop.length, POSITIONS)  # fewer if the target ends a text
    text = generate_text(model, pair.eos_token_ids, prompts, how, loop.seed, loop.work)
    return text, replace(prompts, sources=[*prompts.sources, describe_text(how, name)])


def generate_text(
    model: PreTrainedModel, ends: Collection[int], prompts: Prompts, settings: TextSettings, seed: int, work: Path
) -> TargetText:
    """Let a model continue every prompt, or read the text that an earlier call stored by its digest.

    It is the target, but for on-policy text of a draft. If it has an encoder, prompts are what that reads, and what it
    writes are texts of their own.

    Each batch is a file with a seed derived from ``seed``, so that a killed run repeats only the batch that was lost.

    Args:
        model: the model that writes.
        ends: tokens that end a text; they are kept as its last.
        prompts: the prompts.
        settings: how to generate.
        seed: seed of the sampling.
        work: folder for the text.

    Raises:
        FitError: a file of an earlier run is damaged.
    """
    begun = _begun(model)
    digest = _digest(model, ends, prompts, settings, seed)
    folder = work / f"text-{digest[:16]}"
    tokens = np.zeros((len(prompts.rows), settings.width), dtype=np.int32)
    lengths = np.zeros(len(prompts.rows), dtype=np.int64)
    starts = range(0, len(prompts.rows), settings.generate_batch)
    for part, start in enumerate(tqdm(starts, unit="batch", mininterval=5.0, desc="text to learn from")):
        rows = slice(start, start + settings.generate_batch)
        path = folder / f"part-{part:05d}.npz"
        if not path.is_file():
            seed_of_part = int(hashlib.sha256(f"{digest}/{part}".encode()).hexdigest()[:15], 16)
            texts = continue_rows(model, prompts.rows[rows], ends, settings, seed_of_part)
            padded = np.zeros((len(texts), settings.width), dtype=np.int32)
            for place, text in enumerate(texts):
                padded[place, : len(text)] = text
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, tokens=padded, ends=np.array([len(text) for text in texts], dtype=np.int64))
        tokens[rows], lengths[rows] = _read(path, tokens[rows].shape)
    return TargetText(
        tokens=tokens,
        prompts=np.array([begun or len(row) for row in prompts.rows], dtype=np.int64),
        ends=lengths,
        domain=prompts.domain,
        side=prompts.side,
        domains=prompts.domains,
        digest=digest,
        folder=folder,
        sources=prompts.rows if begun else None,
    )


@torch.inference_mode()
def continue_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], ends: Collection[int], settings: TextSettings, seed: int
) -> list[list[int]]:
    """Prompts with their continuations, from one batch padded on the left; a text stops at its first end token.

    If the model has an encoder, that reads the prompts, and the texts begin with its decoder's start token.
    """
    with_encoder, width = bool(_begun(model)), max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        read = slice(len(row)) if with_encoder else slice(width - len(row), None)  # encoders count from the beginning
        ids[place, read] = torch.tensor(row)
        mask[place, read] = 1
    sampling = {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature else {}
    config = GenerationConfig(
        max_new_tokens=settings.new_tokens,
        do_sample=bool(settings.temperature),
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        **sampling,
        **_of_decoder(model),
    )
    # transformers 5.23 makes a cache of as many layers as a T5's encoder has (findings/t5-deeper-decoder.sh).
    cache = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if with_encoder else {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _without_defaults(model):
        torch.manual_seed(seed)
        written = cast(Any, model).generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config, **cache
        )
    if with_encoder:
        rows, width = written[:, :1].tolist(), 1
    texts = []
    for row, continuation in zip(rows, written[:, width:].tolist(), strict=True):
        # After the end there is padding, whatever token pads.
        last = next((place for place, token in enumerate(continuation) if token in ends), len(continuation))
        texts.append([*row, *continuation[: last + 1]])
    return texts


def _of_decoder(model: PreTrainedModel) -> dict[str, Any]:
    """Those of a model's own settings of generation that are kept; none without an encoder."""
    if not has_encoder(model):
        return {}
    kept = {name: getattr(model.generation_config, name, None) for name in _OF_DECODERS}
    return {**kept, "decoder_start_token_id": start_token(model)}


def _begun(model: PreTrainedModel) -> int:
    """Tokens that every text of a decoder beside an encoder begins with; 0 without one."""
    settings = _of_decoder(model)
    return 0 if not settings else 1 + (settings["forced_bos_token_id"] is not None)


@contextlib.contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's defaults of generation aside.

    They fill in every option that is left open (min_p, penalties, suppressed tokens, beams, ...), and would bend the
    distribution that is to be learnt.
    """
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _read(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            tokens, ends = stored["tokens"], stored["ends"]
        if tokens.shape != shape or ends.shape != shape[:1]:
            raise ValueError(f"it holds {tokens.shape} tokens instead of {shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FitError(f"{path} is damaged ({error}): remove it to generate that part of the text again") from error
    return tokens, ends


def _digest(model: PreTrainedModel, ends: Collection[int], prompts: Prompts, settings: TextSettings, seed: int) -> str:
    sides = [prompts.domain.tolist(), prompts.side.tolist(), prompts.domains]
    # The batch size counts: the sample of a text depends on the texts that are generated with it.
    parts = [weights_digest(model), str(model.dtype), sorted(ends), asdict(settings), seed, prompts.rows, sides]
    parts += [of_decoder] if (of_decoder := _of_decoder(model)) else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def plain_windows(
    model: PreTrainedModel, prompts: Prompts, count: int, width: int, seed: int, work: Path
) -> TargetText:
    """Windows of the documents that training prompts are cut from, equally many of each domain, without overlap.

    A window may hold the end of a document and the beginning of the next. The target is to read them; what is computed
    from them is stored in ``work`` by their digest.

    Raises:
        FitError: there is too little text.
    """
    rng = np.random.default_rng((seed, count))
    rows, places = [np.empty((0, width), dtype=np.int32)], list[int]()
    for place, domain in enumerate(prompts.domains):
        number = count // len(prompts.domains) + (place < count % len(prompts.domains))
        tokens = prompts.trained[domain]
        if len(tokens) // width < number:
            raise FitError(
                f"the text has {len(tokens) // width} windows of {width} tokens in {domain}, and {number} are needed: "
                "give more text or fewer --plain-texts"
            )
        chosen = rng.choice(len(tokens) // width, number, replace=False)
        rows.append(tokens[: len(tokens) // width * width].reshape(-1, width)[chosen])
        places += [place] * number
    tokens = np.concatenate(rows)
    key = json.dumps([weights_digest(model), str(model.dtype), places]).encode()
    digest = hashlib.sha256(key + np.ascontiguousarray(tokens, dtype="<i4").tobytes()).hexdigest()
    return TargetText(
        tokens=tokens,
        prompts=np.zeros(count, dtype=np.int64),
        ends=np.full(count, width, dtype=np.int64),
        domain=np.array(places, dtype=np.int64),
        side=np.full(count, TRAINING, dtype=np.int64),
        domains=prompts.domains,
        digest=digest,
        folder=work / f"plain-{digest[:16]}",
    )
