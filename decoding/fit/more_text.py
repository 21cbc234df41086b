"""What a draft may learn besides the continuations of windows: windows that its target reads, and sets of prompts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.weight_hashes import weights_digest
from ..prompts.prompt_set import PromptSet, encode, load_prompts
from .distilled_text import DistilledText
from .errors import FitError
from .prompt_windows import JUDGING, TRAINING, Prompts

_KEPT_APART = 0.1


@dataclass
class MoreTextSettings:
    """What a draft learns besides what the target writes after windows of text."""

    plain_texts: int = 0
    """Windows of the text itself that the draft learns besides, each as long as a prompt and its continuation
    together. The target only reads them, which is cheaper than writing, and the draft learns at all their positions."""
    prompt_sets: tuple[str, ...] = ()
    """Prompt sets (shipped ones by name, files, or datasets of the hub) whose prompts for training the target
    continues besides, in its chat template where a set is one of chat: give your own traffic here. Prompts for testing
    are never used."""
    each: int = 8
    """How many continuations of each of these prompts the target writes, every one with other dice."""


def check_more_text(settings: MoreTextSettings, own_text: bool) -> None:
    """Refuse what makes no sense, before anything is computed.

    Args:
        settings: to be checked.
        own_text: whether the draft learns from what its target writes at all.

    Raises:
        FitError: a setting is out of range, or has nothing to stand beside.
    """
    for name, least in (("plain_texts", 0), ("each", 1)):
        if getattr(settings, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise FitError(f"{option} {getattr(settings, name)} makes no sense: give at least {least}")
    if not own_text and (settings.plain_texts or settings.prompt_sets):
        raise FitError("--plain-texts and --prompt-sets stand beside the target's own text: give --own-text")


def plain_texts(
    model: PreTrainedModel, prompts: Prompts, count: int, width: int, seed: int, work: Path
) -> DistilledText:
    """Windows of the documents that prompts to train on are cut from, as many of each domain, no two of which overlap.

    Args:
        model: the target, which is to read them.
        prompts: cut from the same text.
        count: how many windows.
        width: tokens of each; it may hold the end of a document and the beginning of the next.
        seed: of the choice.
        work: folder in which what is computed from them is kept, by their digest.

    Raises:
        FitError: there is too little text.
    """
    rng = np.random.default_rng((seed, count))
    rows, places = [np.empty((0, width), dtype=np.int32)], list[int]()
    for place, domain in enumerate(prompts.domains):
        wanted = count // len(prompts.domains) + (place < count % len(prompts.domains))
        tokens = prompts.trained[domain]
        if len(tokens) // width < wanted:
            raise FitError(
                f"the text has {len(tokens) // width} windows of {width} tokens in {domain}, and {wanted} are needed: "
                "give more text or fewer --plain-texts"
            )
        chosen = rng.choice(len(tokens) // width, wanted, replace=False)
        rows.append(tokens[: len(tokens) // width * width].reshape(-1, width)[chosen])
        places += [place] * wanted
    tokens = np.concatenate(rows)
    key = json.dumps([weights_digest(model), str(model.dtype), places]).encode()
    digest = hashlib.sha256(key + np.ascontiguousarray(tokens, dtype="<i4").tobytes()).hexdigest()
    return DistilledText(
        tokens=tokens,
        prompts=np.zeros(count, dtype=np.int64),
        ends=np.full(count, width, dtype=np.int64),
        domain=np.array(places, dtype=np.int64),
        side=np.full(count, TRAINING, dtype=np.int64),
        domains=prompts.domains,
        digest=digest,
        folder=work / f"plain-{digest[:16]}",
    )


def set_prompts(settings: MoreTextSettings, tokenizer: PreTrainedTokenizerBase, room: int, seed: int) -> Prompts:
    """The prompts for training of the sets that are asked for, each as often as it is to be continued.

    A tenth of the prompts of each set, one at least, is kept apart: all of their continuations are for `JUDGING`.

    Args:
        settings: name the sets.
        tokenizer: of the target.
        room: most tokens of a prompt.
        seed: of the order and of what is kept apart.

    Raises:
        PromptFileError: there is no such set, or it cannot be read.
        FitError: a set has fewer than two prompts, or a prompt is too long; or two sets are of one name.
    """
    rng = np.random.default_rng(seed)
    rows, places, sides, domains, sources = list[list[int]](), list[int](), list[int](), list[str](), list[str]()
    for place, name in enumerate(settings.prompt_sets):
        found = load_prompts(name)
        domain = f"{Path(name).stem} prompts"
        if domain in domains:
            raise FitError(f"two of the prompt sets are called {Path(name).stem!r}: rename one, or give it once")
        encoded = _encoded(found, tokenizer, room)
        apart = set(rng.permutation(len(encoded))[: max(1, round(_KEPT_APART * len(encoded)))].tolist())
        for number, prompt in enumerate(encoded):
            rows += [prompt] * settings.each
            sides += [JUDGING if number in apart else TRAINING] * settings.each
        places += [place] * (settings.each * len(encoded))
        domains.append(domain)
        sources.append(f"{domain}: {len(encoded)} for training, {_source(found)}")
    order = rng.permutation(len(rows))
    domain_of, side = (np.array(each, dtype=np.int64)[order] for each in (places, sides))
    return Prompts([rows[n] for n in order], domain_of, side, tuple(domains), sources, {}, {})


def describe_more_text(settings: MoreTextSettings, width: int, target: str) -> list[str]:
    """Lines for a card, after those on the target's own text.

    Args:
        settings: what was learnt besides.
        width: tokens of a plain window.
        target: name of the model.
    """
    found = []
    if settings.plain_texts:
        found.append(f"{target} read {settings.plain_texts:,} windows of {width} tokens of the same documents")
    if settings.prompt_sets:
        found.append(
            f"{target} continued each of the prompts for training of these sets {settings.each} times as well; a tenth "
            "of the prompts was kept apart"
        )
    return found


def _encoded(found: PromptSet, tokenizer: PreTrainedTokenizerBase, room: int) -> list[list[int]]:
    if len(found.train) < 2:
        raise FitError(f"the prompt set {found.name} has 1 prompt for training, and one is kept apart: give more")
    # A prompt that lost its beginning would be another prompt, so none is cut here.
    encoded = encode(found, "train", tokenizer, 2**31)
    longest = max(range(len(encoded)), key=lambda number: len(encoded[number]))
    if len(encoded[longest]) > room:
        raise FitError(
            f"the prompt set {found.name}: train[{longest}] has {len(encoded[longest]):,} tokens, and the target has "
            f"room for {room:,} before --new-tokens: shorten or remove it, or give fewer --new-tokens"
        )
    return encoded


def _source(found: PromptSet) -> str:
    # A file's own path says nothing elsewhere.
    source = Path(found.source).name if Path(found.source).is_absolute() else found.source
    return f"{source}; licence {found.licence}"
