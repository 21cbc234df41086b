"""Text that a target writes itself, for heads and drafts to learn: made in batches, stored in parts, used again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ..files import replacing
from ..models.weight_hashes import weights_digest
from .errors import FitError
from .measure import context_of
from .prompt_windows import TRAINING, Prompts


@dataclass
class TextSettings:
    """How the target's own text is made."""

    texts: int = 4000
    """Prompts that the target continues. A tenth of them is never trained on: early stopping and the report use it."""
    prompt_tokens: int = 64
    """Most tokens of a prompt; the shortest have half as many."""
    new_tokens: int = 128
    """Most tokens that the target writes after a prompt."""
    temperature: float = 0.3
    """Of the target's sampling; 0 takes its likeliest token."""
    generate_batch: int = 64
    """Prompts continued at a time."""


@dataclass(frozen=True)
class DistilledText:
    """Texts that a target wrote after prompts, or that it only reads.

    Attributes:
        tokens: each row a prompt, its continuation, then zeros; shape (n, width), int32.
        prompts: tokens of each prompt, shape (n,), int64; 0 for a text that counts as a whole.
        ends: tokens of each prompt and continuation together, shape (n,), int64.
        domain: of each row its place among ``domains``, shape (n,), int64.
        side: what each row is for (see `prompt_windows`), shape (n,), int64.
        domains: names.
        digest: of all that the text depends on, 64 hex digits.
        folder: where it is kept, and what is computed from it may be.
    """

    tokens: np.ndarray
    prompts: np.ndarray
    ends: np.ndarray
    domain: np.ndarray
    side: np.ndarray
    domains: tuple[str, ...]
    digest: str
    folder: Path

    def written(self) -> np.ndarray:
        """All tokens that the target wrote in texts to train on, shape (n,), int32."""
        places = np.arange(self.tokens.shape[1])
        chosen = (places >= self.prompts[:, None]) & (places < self.ends[:, None])
        return self.tokens[chosen & (self.side == TRAINING)[:, None]]


def join_texts(parts: Sequence[DistilledText]) -> DistilledText:
    """Several texts as one: the rows of the first, then those of the second, and so on; kept where the first is.

    Args:
        parts: at least one. Domains of the same name become one.
    """
    domains = tuple(dict.fromkeys(name for part in parts for name in part.domains))
    width = max(part.tokens.shape[1] for part in parts)
    rows = [np.pad(part.tokens, ((0, 0), (0, width - part.tokens.shape[1]))) for part in parts]
    places = [np.array([domains.index(name) for name in part.domains])[part.domain] for part in parts]
    return DistilledText(
        tokens=np.concatenate(rows),
        prompts=np.concatenate([part.prompts for part in parts]),
        ends=np.concatenate([part.ends for part in parts]),
        domain=np.concatenate(places),
        side=np.concatenate([part.side for part in parts]),
        domains=domains,
        digest=hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest(),
        folder=parts[0].folder,
    )


def frequent_tokens(tokens: np.ndarray, count: int, vocabulary_size: int | None = None) -> tuple[int, ...]:
    """The most frequent tokens of a text, ascending; none if ``count`` is 0.

    Args:
        tokens: of the text, shape (n,).
        count: how many.
        vocabulary_size: of the model. With it, what the text lacks is made up by the tokens of the lowest numbers,
            which a byte-pair tokeniser found most often in text of its own; without it there may be fewer.
    """
    times = np.bincount(tokens, minlength=vocabulary_size or 0)
    likeliest = np.argsort(-times, kind="stable")  # of tokens as frequent, the lowest number first
    if vocabulary_size is None:
        likeliest = likeliest[times[likeliest] > 0]
    return tuple(sorted(map(int, likeliest[:count])))


def describe_text(settings: TextSettings, target: str) -> str:
    """A line for a card, after those on where the prompts come from.

    Args:
        settings: how the text was made.
        target: name of the model that wrote it.
    """
    return (
        f"{target} itself continued {settings.texts:,} prompts of {max(2, settings.prompt_tokens // 2)} to "
        f"{settings.prompt_tokens} tokens cut from that text by at most {settings.new_tokens} tokens, at temperature "
        f"{settings.temperature:g}; a tenth of the prompts was kept apart"
    )


def check_text_settings(settings: TextSettings, model: PreTrainedModel, new_tokens: int, learner: str) -> None:
    """Refuse what cannot work, before anything is generated.

    Args:
        settings: to be checked.
        model: the target.
        new_tokens: the least tokens of a continuation from which anything can be learnt.
        learner: what learns from it, for messages.

    Raises:
        FitError: a setting is out of range, the windows exceed the target's context, or nothing could be learnt.
    """
    for name, least in (("prompt_tokens", 2), ("new_tokens", new_tokens), ("generate_batch", 1)):
        if getattr(settings, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise FitError(f"{option} {getattr(settings, name)} is too few for {learner}: give at least {least}")
    if not 0 <= settings.temperature < float("inf"):
        raise FitError(f"--temperature {settings.temperature} makes no sense: give 0 or more")
    if settings.prompt_tokens + settings.new_tokens > context_of(model):
        raise FitError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} are together more than "
            f"the model's context of {context_of(model)} tokens"
        )


def distil_text(
    model: PreTrainedModel, ends: Collection[int], prompts: Prompts, settings: TextSettings, seed: int, work: Path
) -> DistilledText:
    """Let the target continue every prompt, or read what it wrote when it was last asked so.

    Each batch is a file of its own, so that a run that is killed goes on with the batch that was lost.

    Args:
        model: the target.
        ends: tokens that end a text; they are kept as its last.
        prompts: what to continue.
        settings: how.
        seed: of the sampling; every batch has its own, so that it does not matter which are generated anew.
        work: folder in which the text is kept, by its digest.

    Raises:
        FitError: a file of an earlier run is damaged.
    """
    digest = _digest(model, ends, prompts, settings, seed)
    folder = work / f"text-{digest[:16]}"
    width = settings.prompt_tokens + settings.new_tokens
    tokens = np.zeros((len(prompts.rows), width), dtype=np.int32)
    lengths = np.zeros(len(prompts.rows), dtype=np.int64)
    starts = range(0, len(prompts.rows), settings.generate_batch)
    for part, start in enumerate(tqdm(starts, unit="batch", mininterval=5.0, desc="text of the target")):
        rows = slice(start, start + settings.generate_batch)
        path = folder / f"part-{part:05d}.npz"
        if not path.is_file():
            found = continue_rows(model, prompts.rows[rows], ends, settings, _seed(digest, part))
            written, ended = _padded(found, width)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, tokens=written, ends=ended)
        tokens[rows], lengths[rows] = _read(path, tokens[rows].shape)
    return DistilledText(
        tokens=tokens,
        prompts=np.array([len(row) for row in prompts.rows], dtype=np.int64),
        ends=lengths,
        domain=prompts.domain,
        side=prompts.side,
        domains=prompts.domains,
        digest=digest,
        folder=folder,
    )


@torch.inference_mode()
def continue_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], ends: Collection[int], settings: TextSettings, seed: int
) -> list[list[int]]:
    """Prompts with their continuations, in one batch padded on the left; nothing follows a token that ends a text.

    Args:
        model: the target.
        rows: token ids of the prompts.
        ends: tokens that end a text.
        settings: how many tokens, and the temperature.
        seed: of the sampling.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    sampling = {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature else {}
    config = GenerationConfig(
        max_new_tokens=settings.new_tokens,
        do_sample=bool(settings.temperature),
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        **sampling,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _without_defaults(model):
        torch.manual_seed(seed)
        written = cast(Any, model).generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    found = []
    for row, continuation in zip(rows, written[:, width:].tolist(), strict=True):
        # What follows the end is padding, whatever token pads.
        last = next((place for place, token in enumerate(continuation) if token in ends), len(continuation))
        found.append([*row, *continuation[: last + 1]])
    return found


@contextlib.contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Set a model's own defaults of generation aside.

    They fill in whatever is not asked for (min_p, penalties, suppressed tokens, beams, ...), and would bend the
    distribution that is to be learnt.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(rows), width), dtype=np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], dtype=np.int64)


def _read(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            tokens, ends = stored["tokens"], stored["ends"]
        if tokens.shape != shape or ends.shape != shape[:1]:
            raise ValueError(f"it holds {tokens.shape} tokens instead of {shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FitError(
            f"{path} is damaged ({error}): remove it, and that part of the text is generated anew"
        ) from error
    return tokens, ends


def _digest(model: PreTrainedModel, ends: Collection[int], prompts: Prompts, settings: TextSettings, seed: int) -> str:
    sides = [prompts.domain.tolist(), prompts.side.tolist(), prompts.domains]
    # The batch is part of it: what is drawn for one text depends on which others are drawn with it.
    parts = [weights_digest(model), str(model.dtype), sorted(ends), asdict(settings), seed, prompts.rows, sides]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _seed(digest: str, part: int) -> int:
    return int(hashlib.sha256(f"{digest}/{part}".encode()).hexdigest()[:15], 16)
