"""Tokenizers of a few words, and drafts whose words are partly others than their target's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specgym.decoding.drafts.translated import TranslatedModel
from specgym.decoding.drafts.translation import Translation, Vocabulary
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.table_models import TableModel, random_table

SPELLED = 1
"""Number of the target's token that the draft spells with two of its own."""


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these words, numbered in order; text without spaces is one word."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0])


def target_words(count: int) -> list[str]:
    """Words of a target."""
    return ["xy" if number == SPELLED else f"w{number}" for number in range(count)]


def draft_words(count: int) -> list[str]:
    """Words of its draft: in another order, with the two letters of one of the target's, and a word that it lacks."""
    words = target_words(count)
    words[SPELLED] = "only-the-draft's"
    return [*words[::-1], "x", "y"]


def translated(draft: LanguageModel, count: int) -> TranslatedModel:
    """A draft of `draft_words` in the vocabulary of `target_words`."""
    ours, theirs = word_tokenizer(target_words(count)), word_tokenizer(draft_words(count))
    return TranslatedModel(draft, Translation(Vocabulary(ours, count), Vocabulary(theirs, draft.vocabulary_size)))


def translated_table(count: int, seed: int, spread: float = 1.0) -> TranslatedModel:
    """A draft of random scores for a target of so many tokens, its vocabulary padded."""
    return translated(TableModel(random_table(count + 3, seed, spread)), count)


def translated_twin(target: TableModel, noise: float = 0.0) -> TranslatedModel:
    """A draft that scores the words that it shares with a target as the target does, but for noise."""
    count = target.vocabulary_size
    order = torch.tensor([*range(count)][::-1] + [SPELLED] * 2)  # the letters are like the word that they spell
    table = target.table[order][:, order][:, :, order] + noise * random_table(count + 2, 5)
    return translated(TableModel(table), count)
