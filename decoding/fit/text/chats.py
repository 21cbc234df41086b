"""Chats to learn from: answers to prompts, and to prompts that a chat model writes itself.

Xu et al., "Magpie" (arXiv 2406.08464): given the chat template up to where a user's message begins, an aligned model
goes on with a message such as its users write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import FitError
from ...loading.pair import Pair
from ...loading.prompt_tokens import encode
from ...prompts import PromptSet
from ..measure import context_of
from ..settings import OwnTextSettings, TextSettings, require_least
from .corpus_text import TEXTS, require_batch
from .prompts import JUDGING, SPEED, TRAINING, Prompts, cut_prompts, set_prompts
from .target_text import TargetText, check_text_settings, describe_text, generate_text, join_texts

DOMAIN = "own chat prompts"
_HELD_OUT = 20
"""One of so many messages is held out for early stopping, and one for measuring the speed."""
_FEWEST = 8
_MARK = "\x02message\x03"


@dataclass
class ChatTextSettings:
    """Chats to learn from, besides the target's continuations of windows."""

    prompt_sets: tuple[str, ...] = ()
    """Prompt sets (shipped ones by name, files, or datasets of the hub) whose training prompts the target answers as
    well, in its chat template if the set is one of chat. Give your own traffic here. Test prompts are never used. A
    target with an encoder reads them as sources."""
    continuations: Annotated[int, tyro.conf.arg(aliases=("--each",))] = 8
    """Sampled answers to each prompt of the prompt sets. Its earlier name is --each."""
    own_prompts: int = 0
    """Messages of users that a chat model begins itself, at temperature 1, and then answers (Magpie, arXiv 2406.08464):
    where the prompts of its users are not known. Empty and repeated ones are dropped."""
    own_prompt_tokens: int = 64
    """Longest such message, in tokens; one that has no end by then is dropped."""
    answer_tokens: int | None = None
    """Longest answer to a prompt of the prompt sets or of its own, in tokens. Default: --new-tokens."""

    def answers(self, how: TextSettings, prompts: Prompts) -> TextSettings:
        """Settings for answering prompts, of which there is at least one; ``how`` windows are continued."""
        new_tokens = how.new_tokens if self.answer_tokens is None else self.answer_tokens
        longest = max(map(len, prompts.rows))
        return replace(how, texts=len(prompts.rows), prompt_tokens=longest, new_tokens=new_tokens)


def text_of(settings: OwnTextSettings, chats: ChatTextSettings, pair: Pair, name: str) -> tuple[TargetText, list[str]]:
    """All text of a run, written now or read from what an earlier call stored, and lines for the card on its origin.

    Args:
        settings: continuations of windows, seed, size of a batch, and folder.
        chats: prompt sets, and chats of the target's own.
        pair: the target, with its tokeniser and weights that are not prepacked.
        name: of the target, for the card.

    Raises:
        FileNotFoundError: there is nothing to cut prompts from.
        FitError: a setting is out of range, or there is too little text.
    """
    assert pair.tokenizer is not None
    model, ends = pair.target.model, pair.eos_token_ids
    how, loop, work = settings.own_text, settings.loop, settings.loop.work
    check_text_settings(how, model, 3)
    # All text to read is chosen, and may be refused, before anything is computed.
    prompts = cut_prompts(pair.tokenizer, settings.corpus, settings.text, how.texts, how.prompt_tokens, loop.seed)
    require_batch(prompts.count(TRAINING), loop.batch, TEXTS)
    asked, sources = chat_prompts(chats, how, pair, name, loop.seed, work)
    parts = [generate_text(model, ends, some, chats.answers(how, some), loop.seed, work) for some in asked]
    parts.insert(0, generate_text(model, ends, prompts, how, loop.seed, work))
    return join_texts(parts), [*prompts.sources, describe_text(how, name), *sources]


def chat_prompts(
    chats: ChatTextSettings, how: TextSettings, pair: Pair, name: str, seed: int, work: Path
) -> tuple[list[Prompts], list[str]]:
    """Prompts to answer, the target's own before those of sets, and lines for the card on their origin and answers.

    Args:
        chats: which prompts, and how long the answers are.
        how: how to generate what the target writes.
        pair: the target, with its tokeniser and weights that are not prepacked.
        name: of the target, for the card.
        seed: seed of all choices.
        work: folder for what is generated.

    Raises:
        FitError: a setting is out of range, a prompt and its answer exceed the context, or too few messages are left.
    """
    assert pair.tokenizer is not None
    model, tokenizer = pair.target.model, pair.tokenizer
    require_least(chats, continuations=1, own_prompts=0, own_prompt_tokens=1)
    if chats.answer_tokens is not None:
        require_least(chats, answer_tokens=2)
    answer_tokens = how.new_tokens if chats.answer_tokens is None else chats.answer_tokens
    option = "--new-tokens" if chats.answer_tokens is None else "--answer-tokens"
    room = context_of(model) - answer_tokens
    if chats.own_prompts and len(turn_of_user(tokenizer)[0]) + chats.own_prompt_tokens > room:
        raise FitError(
            f"a message of {chats.own_prompt_tokens} tokens and an answer of {answer_tokens} do not fit the context of "
            f"{name}: give fewer --own-prompt-tokens or {option}"
        )
    asked = [set_prompts(chats.prompt_sets, chats.continuations, tokenizer, room, seed, behind=option)]
    if chats.own_prompts:
        message = replace(how, new_tokens=chats.own_prompt_tokens)
        ends = pair.eos_token_ids
        asked.insert(0, write_prompts(model, tokenizer, ends, chats.own_prompts, message, seed, work, name))
    asked = [some for some in asked if some.rows]
    sources = [line for some in asked for line in some.sources]
    if asked:
        sources.append(
            f"{name} answered each of these prompts by at most {answer_tokens} tokens, those of prompt sets "
            f"{chats.continuations} times; a tenth of the prompts was held out"
        )
    return asked, sources


def write_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    count: int,
    settings: TextSettings,
    seed: int,
    work: Path,
    name: str,
) -> Prompts:
    """Let a chat model write users' messages, at temperature 1, each then to be answered by itself.

    A message that is empty, comes twice or does not end is dropped. A tenth of the rest is held out, by a hash of its
    text, half of it for early stopping and half for measuring the speed.

    Args:
        model: the chat model.
        tokenizer: with a chat template.
        ends: tokens that end a text.
        count: messages to begin.
        settings: how to generate; `new_tokens` is the length of a message, at most.
        seed: seed of the sampling.
        work: folder for what is generated.
        name: of the model, for the card.

    Raises:
        FitError: there is no chat template, or one in which no special token ends a message, or too few messages were
            left.
    """
    prefix, ending = turn_of_user(tokenizer)
    longest = settings.new_tokens
    if len(prefix) + longest > context_of(model):
        raise FitError(f"a message of {longest} tokens does not fit the context of {model.name_or_path}: give fewer")
    begun = Prompts(
        rows=[prefix] * count,
        domain=np.zeros(count, dtype=np.int64),
        side=np.zeros(count, dtype=np.int64),
        domains=(DOMAIN,),
        sources=[],
        held_out={},
        trained={},
    )
    how = replace(settings, texts=count, prompt_tokens=max(2, len(prefix)), temperature=1.0)
    written = generate_text(model, {*ends, ending}, begun, how, seed, work)
    messages = dict[str, None]()
    for tokens, end in zip(written.tokens, written.ends, strict=True):
        if tokens[end - 1] not in {*ends, ending} or end <= len(prefix):
            continue  # cut short
        message = str(tokenizer.decode(tokens[len(prefix) : end - 1].tolist(), skip_special_tokens=True)).strip()
        if message and "\N{REPLACEMENT CHARACTER}" not in message:
            messages.setdefault(message)
    if len(messages) < _FEWEST:
        raise FitError(
            f"{count} messages begun by {name} left {len(messages)} that differ and end within {longest} "
            f"tokens, and {_FEWEST} are needed: give more --own-prompts, or leave them out for one that does not chat"
        )
    texts = tuple(messages)
    asked = PromptSet(DOMAIN, texts, ("-",), "", "", chat=True)
    sides = np.array([_side(text) for text in texts], dtype=np.int64)
    sides[:2] = JUDGING, SPEED  # there is one of each at least
    return Prompts(
        rows=encode(asked, "train", tokenizer, context_of(model) // 2),
        domain=np.zeros(len(texts), dtype=np.int64),
        side=sides,
        domains=(DOMAIN,),
        sources=[
            f"{DOMAIN}: {name} itself began {count:,} messages of a user, of at most {longest} tokens, at temperature "
            f"1; {len(texts):,} differ from all others and end, and a tenth of these was held out"
        ],
        held_out={},
        trained={},
    )


def turn_of_user(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of a chat template up to where a user's message begins, and the token that follows the message.

    Raises:
        FitError: there is no template, it changes messages, or no special token follows them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FitError("--own-prompts are for models that chat, and the target's tokenizer has no chat template")
    text = str(
        tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False)
    )
    before, mark, after = text.partition(_MARK)
    following = tokenizer(after, add_special_tokens=False)["input_ids"] if mark else []
    if not following or following[0] not in tokenizer.all_special_ids:
        raise FitError(
            "--own-prompts need a chat template in which a special token ends a user's message, and that of the "
            "target's tokenizer has none: leave them out, or give prompts by --prompt-sets"
        )
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]), following[0]


def _side(text: str) -> int:
    place = hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT
    return {0: JUDGING, 1: SPEED}.get(place, TRAINING)
