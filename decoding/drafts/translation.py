"""Tokens of a target in terms of a draft's: which stand for the same text, and how the draft reads the others.

A draft with a tokenizer of its own may propose the tokens that both vocabularies have, and its distribution over these
alone, renormalised, is what it draws from and what verification compares with: the target's text stays its own, greedy
or sampled (Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
Vocabularies", arXiv 2502.05202, algorithm 4). transformers compares tokens by their strings; here it is by their bytes,
so that byte-level vocabularies and those of SentencePiece have as much in common as their texts do.

Vocabularies of one family that are padded to other sizes, or where one has an added token, are the simple case of it:
all that both have is numbered alike.

The draft reads a text token by token, and spells those that it lacks. Cutting the text anew, as its own tokenizer
would, takes time every round and makes it guess no better: of 385 tokens that SmolLM2-135M wrote, tiny-10m guessed 161
with the one and 160 with the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_ROLES = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
_NONE = -1


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest number of a token; added tokens may leave gaps, so it may exceed `len(tokenizer)`."""
    return max(tokenizer.get_vocab().values(), default=-1)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens of a model.

    Args:
        tokenizer: the model's, or one that numbers its tokens alike.
        rows: tokens that the model gives scores to; beyond those of the tokenizer they are padding.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: int

    @cached_property
    def names(self) -> dict[int, str]:
        """The tokenizer's strings by number, without those that the model has no row for."""
        return {number: name for name, number in self.tokenizer.get_vocab().items() if number < self.rows}

    @cached_property
    def texts(self) -> dict[int, bytes | str]:
        """By number, the bytes that a token adds to a text; of a special token its name, a string."""
        return dict(self._texts())

    def _texts(self) -> Iterable[tuple[int, bytes | str]]:
        # Conventions of a vocabulary are seen from what its tokenizer makes of them.
        joined = self.tokenizer.convert_tokens_to_string
        byte_level, metaspace = joined(["aĠa"]) == "a a", joined(["a▁a"]) == "a a"
        byte_fallback = joined(["a", "<0x41>"]) == "aA"
        added = self.tokenizer.added_tokens_decoder
        for number, name in self.names.items():
            if number in added:
                yield number, name if added[number].special else name.encode()
            elif byte_level:
                yield number, b"".join(_BYTES.get(letter) or letter.encode() for letter in name)
            elif byte_fallback and len(name) == 6 and name.startswith("<0x"):
                yield number, bytes([int(name[3:5], 16)])
            else:
                yield number, (name.replace("▁", " ") if metaspace else name).encode()

    @cached_property
    def numbers(self) -> dict[bytes | str, int]:
        """The token of every text; the last of several with the same text, such as a letter and its byte."""
        return {text: number for number, text in sorted(self.texts.items())}

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest ordinary token."""
        return max((len(text) for text in self.texts.values() if isinstance(text, bytes)), default=0)

    def spell(self, text: bytes) -> list[int]:
        """Tokens of a text, the longest that fits first; bytes that no token begins with are left out."""
        place, tokens = 0, list[int]()
        while place < len(text):
            ends = range(min(len(text), place + self.longest), place, -1)
            end = next((end for end in ends if text[place:end] in self.numbers), 0)
            if end:
                tokens.append(self.numbers[text[place:end]])
            place = end or place + 1
        return tokens

    def of_role(self, role: str) -> int:
        """Number of a special token by its role, such as `eos_token_id`; -1 for none."""
        number = getattr(self.tokenizer, role, None)
        return number if number is not None and number < self.rows else _NONE


def _byte_letters() -> dict[str, bytes]:
    """Letters of byte-level vocabularies (openai/gpt-2, src/encoder.py): printable bytes are letters of that number,
    the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    letters = {chr(number): bytes([number]) for number in printable}
    return letters | {chr(256 + place): bytes([number]) for place, number in enumerate(others)}


_BYTES = _byte_letters()


class Translation:
    """Tokens of a target as a draft reads and proposes them.

    Args:
        target: its vocabulary.
        draft: its vocabulary.

    Attributes:
        ids: the draft's number of each of the target's tokens, no number twice, shape (target's rows,), int64; -1 for
            tokens that the draft cannot propose.
        complete: whether the draft has all the tokens of the target's tokenizer, numbered alike.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary) -> None:
        self.target, self.draft = target, draft
        self.ids = torch.full((target.rows,), _NONE)
        if target.tokenizer is draft.tokenizer or target.names == draft.names:
            pairs = {number: number for number in target.names if number < draft.rows}
        else:
            pairs = _pairs(target, draft)
        if pairs:
            self.ids[torch.tensor(list(pairs))] = torch.tensor(list(pairs.values()))
        self.complete = len(pairs) == len(target.names) and all(ours == theirs for ours, theirs in pairs.items())
        self._pieces: dict[int, tuple[int, ...]] = {ours: (theirs,) for ours, theirs in pairs.items()}
        roles = (draft.of_role(role) for role in ("unk_token_id", "eos_token_id", "bos_token_id"))
        self._unknown = next((number for number in roles if number != _NONE), 0)
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def common(self) -> int:
        """Number of tokens that the draft can propose."""
        return int((self.ids != _NONE).sum())

    def difference(self) -> str:
        """The first number that stands for different tokens, in words; empty if there is none."""
        ours, theirs = self.target.names, self.draft.names
        for number in sorted(ours.keys() & theirs.keys()):
            if ours[number] != theirs[number]:
                return f"token {number} is {ours[number]!r} to the target and {theirs[number]!r} to the draft"
        return ""

    def digest(self) -> str:
        """Return a SHA-256 over both vocabularies, 64 hex digits."""
        state = hashlib.sha256()
        for side in (self.target, self.draft):
            state.update(f"{side.rows} {sorted(side.names.items())}\n".encode())
        return state.hexdigest()

    def pieces(self, token: int) -> tuple[int, ...]:
        """Tokens that the draft reads for one of the target's, at least one: the same token, or its text spelled."""
        if token not in self._pieces:
            text = self.target.texts.get(token, b"")
            spelled = self.draft.spell(text if isinstance(text, bytes) else text.encode())
            self._pieces[token] = tuple(spelled) or (self._unknown,)
        return self._pieces[token]

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """The token with which the draft's texts begin, if its tokenizer puts it there and the target's does not."""
        number = self.draft.of_role("bos_token_id")
        usual = [] if self.target.names == self.draft.names else self.draft.tokenizer("")["input_ids"]
        return (number,) if number in usual else ()

    def spell(self, tokens: Sequence[int], first: bool) -> list[tuple[int, ...]]:
        """Pieces of each token; before the first of a text what the draft's texts begin with."""
        pieces = [self.pieces(token) for token in tokens]
        if first and pieces and pieces[0][:1] != self.begin:
            pieces[0] = (*self.begin, *pieces[0])
        return pieces

    def one_to_one(self, tokens: Tensor) -> Tensor:
        """The draft's tokens for those of the target that it can propose, of equal shape and on the same device."""
        return self._on(tokens.device)[0][tokens]

    def scores(self, scores: Tensor) -> Tensor:
        """Scores of the target's tokens: the least number for what the draft cannot propose.

        Args:
            scores: of the draft, shape (..., the draft's rows), float32.

        Returns:
            Shape (..., the target's rows).
        """
        source, missing = self._on(scores.device)
        return scores.index_select(-1, source).masked_fill_(missing, torch.finfo(scores.dtype).min)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A number of the draft for each of the target's tokens, and which of them it cannot propose."""
        if device not in self._moved:
            missing = self.ids == _NONE
            self._moved[device] = self.ids.masked_fill(missing, self._unknown).to(device), missing.to(device)
        return self._moved[device]


def _pairs(target: Vocabulary, draft: Vocabulary) -> dict[int, int]:
    """Numbers of the target's and of the draft's tokens that stand for the same; each at most once."""
    # What is numbered alike stays so, whatever other tokens have the same text.
    pairs = {number: number for number, text in target.texts.items() if draft.texts.get(number) == text}
    taken = set(pairs)

    def match(ours: int, theirs: int) -> None:
        if ours not in pairs and theirs not in taken and _NONE not in (ours, theirs):
            pairs[ours] = theirs
            taken.add(theirs)

    for text, number in target.numbers.items():
        match(number, draft.numbers.get(text, _NONE))
    for role in _ROLES:
        match(target.of_role(role), draft.of_role(role))
    return pairs
