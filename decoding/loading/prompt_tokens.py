"""Token ids of prompts: whole where there is room, else cut so that what a model needs around a prompt stays.

Longest prompt: what a command asks for holds in its process and in those it starts.
"""

from __future__ import annotations

import bisect
import functools
import logging
import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import PromptError, whole_number
from ..prompts import PromptSet, Split, shorten

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from .pair import Pair

ROOM = 256
"""Tokens of a context that prompts leave free, or half of a context that is shorter than two times that."""
_VARIABLE = "SPECGYM_MAX_PROMPT_TOKENS"
"""Environment variable that tells processes started later; it is set here, and not meant for users."""


def default_prompt_tokens() -> int | None:
    """Tokens of a prompt, at most, where a workload does not say; None for as many as there is room for."""
    stored = os.environ.get(_VARIABLE)
    return int(stored) if stored else None


@contextmanager
def prompts_limited(max_tokens: int | None) -> Iterator[None]:
    """Make a length the default of this process and of those that it starts; restore the one before at the end.

    Raises:
        PromptError: it is below 2.
    """
    if max_tokens is not None:
        max_tokens = whole_number("max_prompt_tokens", max_tokens, at_least=2, error=PromptError)
    before = default_prompt_tokens()
    _set(max_tokens)
    try:
        yield
    finally:
        _set(before)


def _set(max_tokens: int | None) -> None:
    os.environ.pop(_VARIABLE, None)
    if max_tokens is not None:
        os.environ[_VARIABLE] = str(max_tokens)


def prompt_limit(pair: Pair, asked: int | None) -> tuple[int, str]:
    """Tokens of a prompt, at most, and the reason in words: what is asked for, or the room in the shortest context."""
    from ..drafts.mixed import draft_models  # which imports torch; whoever only cuts texts needs none

    if (longest := pair.target.source_limit) is not None:
        return min(asked or longest, longest), f"the longest source asked for, or that {pair.target.name} reads"
    models = [pair.target, *draft_models(pair.draft)]
    shortest = min(models, key=lambda model: model.context_limit)
    context = shortest.context_limit
    free = min(ROOM, context // 2)
    if asked is not None and asked < context - free:
        return asked, "the max_prompt_tokens asked for"
    return context - free, f"so that {free:,} of {shortest.name}'s context of {context:,} are left for the text"


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning unless this process has logged the same before."""
    logging.getLogger(__name__).warning(message)


def must_cut(name: str, split: Split, whole: Sequence[Sequence[int]], limit: int, why: str) -> bool:
    """Decide whether any prompt of a split, as token ids, is longer than a limit; a warning says how many, and why."""
    long = [len(ids) for ids in whole if len(ids) > limit]
    if long:
        warn_once(
            f"{name}: {len(long)} of {len(whole)} {split} prompts, of up to {max(long):,} tokens, are cut to "
            f"{limit:,}, {why}"
        )
    return bool(long)


Rows = tuple[tuple[int, ...], ...]
# The tokenizer is kept beside its prompts: an id stands for an object only as long as that lives.
_encodings: dict[tuple[int, str, Split, int | None], tuple[PreTrainedTokenizerBase, Rows]] = {}


def encode_once(pair: Pair, prompts: PromptSet, split: Split, max_tokens: int | None) -> Rows:
    """Return what `encode` does with a pair's tokenizer; a second call in a process returns the same object.

    Raises:
        PromptError: the pair has no tokenizer; or as for `encode`.
    """
    if pair.tokenizer is None:
        raise PromptError(
            f"pair {pair.name} has no tokenizer, and prompt set {prompts.name!r} is text; give Pair(..., "
            "tokenizer=...) or specgym.envs.TokenPrompts"
        )
    key = (id(pair.tokenizer), prompts.digest, split, max_tokens)
    if key not in _encodings:
        encoded = encode(prompts, split, pair.tokenizer, max_tokens)
        _encodings[key] = pair.tokenizer, tuple(map(tuple, encoded))
    return _encodings[key][1]


def encode(
    prompt_set: PromptSet, split: Split, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> list[list[int]]:
    """Token ids of every prompt of a split, in order, each 1 to `max_tokens` long; None cuts none.

    A chat set goes through the tokenizer's chat template, up to where the assistant is to speak; without a template
    its prompts are plain text. What is too long is cut. Plain text loses its beginning, because the model continues
    from the end; a BOS token, and whatever else the tokenizer puts before a text, stays. A text that it ends,
    a source for an encoder, loses its own end instead. A message loses its middle,
    because a task stands at its beginning or its end; the template around it stays as it is.

    Raises:
        PromptError: a prompt has no tokens; the chat template raises an error, leaves messages out, or is itself longer
            than `max_tokens`.
        ArgumentError: `max_tokens` is no whole number of at least 2.
        ValueError: the split is neither "train" nor "test".
    """
    if max_tokens is not None:
        whole_number("max_tokens", max_tokens, at_least=2)
    templated = prompt_set.chat and bool(getattr(tokenizer, "chat_template", None))
    prompts = prompt_set.split(split)
    names = [f"prompt set {prompt_set.name!r}: {split}[{n}] ({shorten(text)!r})" for n, text in enumerate(prompts)]
    whole = [
        _templated(prompt, tokenizer, name) if templated else _tokens(tokenizer, prompt)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    for ids, name in zip(whole, names, strict=True):
        if not ids:
            raise PromptError(f"{name} has no tokens with this tokenizer; remove it")
    # Templates that take a message in parts write nothing of one that is a string.
    written = [_written(prompt, tokenizer, tokenize=False) for prompt in prompts[:2]] if templated else []
    if len(written) > 1 and written[0] == written[1]:
        raise PromptError(
            f"prompt set {prompt_set.name!r}: {_template_of(tokenizer)} writes the same for every message, so it does "
            f"not take them as text; {_WITHOUT}"
        )
    cut = _cut_message if templated else _cut_text
    return [
        ids if max_tokens is None or len(ids) <= max_tokens else cut(prompt, ids, tokenizer, max_tokens, name)
        for prompt, ids, name in zip(prompts, whole, names, strict=True)
    ]


def cut_ids(ids: list[int], max_tokens: int | None, kept: int) -> list[int]:
    """Return ids, without those after the first `kept` that are too many.

    Args:
        ids: of a prompt.
        max_tokens: at least 2; None for any number.
        kept: ids at the beginning that stay, as far as the last id still does.
    """
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    kept = min(kept, max_tokens - 1)
    return ids[:kept] + ids[len(ids) - max_tokens + kept :]


_WITHOUT = (
    "take the prompts for plain text (load_prompts(..., chat=False), or a file of plain prompts), or give the pair a "
    "tokenizer with another template (Pair(..., tokenizer=...))"
)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f"the chat template of {name}" if name else "the tokenizer's chat template"


def _written(message: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    messages = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)


def _templated(message: str, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    try:
        return list(_written(message, tokenizer, return_dict=False))
    except Exception as error:  # a template is a program, and what it refuses it says in exceptions of any kind
        raise PromptError(
            f"{name}: {_template_of(tokenizer)} refuses a user's message alone ({type(error).__name__}: {error}); "
            f"{_WITHOUT}"
        ) from error


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    # Cut here and not by the tokenizer, whose own truncation would warn of, or apply, limits of its own.
    return list(tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"])


def _cut_text(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, max_tokens: int, _: str) -> list[int]:
    bare = _tokens(tokenizer, text, special=False)
    added = len(ids) - len(bare)
    if added and ids[-1] == tokenizer.eos_token_id and bare[-1:] != ids[-1:]:  # a source, to be read and not continued
        return [*ids[: max_tokens - 1], ids[-1]]
    before = added if ids[added:] == bare else 0
    return cut_ids(ids, max_tokens, max(before, int(ids[0] == tokenizer.bos_token_id)))


def _cut_message(
    message: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, max_tokens: int, name: str
) -> list[int]:
    """Ids of the template around as many characters of a message, from both its ends, as there is room for.

    LongBench (github.com/THUDM/LongBench, pred.py) cuts what is too long in the same place.
    """

    def write(characters: int) -> list[int]:
        first = (characters + 1) // 2
        return _templated(message[:first] + message[len(message) - characters + first :], tokenizer, name)

    # A text does not always have more tokens than a part of it; what the search ends with was tried, and fits.
    fitting = bisect.bisect_right(range(1, len(message)), max_tokens, key=lambda characters: len(write(characters)))
    if not fitting:
        raise PromptError(
            f"{name} has {len(ids):,} tokens and may have {max_tokens:,}, which {_template_of(tokenizer)} needs for "
            f"itself; raise max_prompt_tokens (--max-prompt-tokens) if the context has room, or {_WITHOUT}"
        )
    return write(fitting)


def checked_prompt(pair: Pair, prompt_ids: str | Sequence[int] | Tensor) -> list[int]:
    """Return a prompt as token ids of a pair.

    Args:
        pair: whose target reads it.
        prompt_ids: a string, or ids as a list, or as a tensor or array of shape (tokens,) or (1, tokens).

    Raises:
        PromptError: the prompt is empty, too long, or holds ids outside the vocabulary.
    """
    ids: Any = prompt_ids
    if isinstance(ids, str):
        ids = pair.encode(ids)
    first = ids[0] if isinstance(ids, list | tuple) and ids else None
    if isinstance(first, list | tuple) or getattr(first, "ndim", 0) > 0:
        if len(ids) > 1:
            raise PromptError(f"one prompt at a time: this is a list of {len(ids)}; generate_batch takes several")
        ids = first  # a tokenizer's output for a list of one text
    if hasattr(ids, "ndim") and hasattr(ids, "tolist"):  # a tensor or an array; importing torch takes seconds
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1:
            raise PromptError(f"one prompt at a time: expected shape (tokens,), got {tuple(ids.shape)}")
        ids = ids.tolist()
    try:
        prompt = [operator.index(token) for token in ids]
    except TypeError as error:
        raise PromptError(
            "a prompt is a string, or one list or tensor of whole token ids; this is a "
            f"{type(prompt_ids).__name__} ({error}). From a tokenizer's output take its 'input_ids'."
        ) from error
    target = pair.target
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token, for instance the model's BOS token")
    known = target.source_vocabulary or target.vocabulary_size
    if min(prompt) < 0 or max(prompt) >= known:
        raise PromptError(
            f"the prompt has ids from {min(prompt)} to {max(prompt)}, but {target.name} has a vocabulary of "
            f"{known}; encode it with the target's own tokenizer"
        )
    if target.source_limit is not None:
        if len(prompt) > target.source_limit:
            raise PromptError(
                f"the source has {len(prompt)} tokens and {target.name} reads {target.source_limit} at most: shorten it"
            )
    elif len(prompt) >= target.context_limit:
        raise PromptError(
            f"the prompt has {len(prompt)} tokens and {target.name} a context of {target.context_limit}, which "
            "leaves no room to generate; shorten the prompt"
        )
    return prompt
