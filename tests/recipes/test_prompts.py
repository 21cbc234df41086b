"""The recipes of prompt sets and of the tokeniser."""

from __future__ import annotations

import pytest

from recipes.prompts import choose, cut_prompts
from recipes.tokenizer import train_tokenizer
from tests.helpers.counting import words


def test_the_tokenizer_gives_text_back_as_it_was() -> None:
    tokenizer = train_tokenizer([words(500)], 300)
    text = "def f( x ):\n\treturn  x  # é ☃\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0


def test_code_prompts_start_at_definitions_and_end_lines() -> None:
    text = "import os\n\n\n" + "".join(
        f"def function_{i}(a, b):\n    first = a + b\n    second = a - b\n    return first, second\n\n\n"
        for i in range(20)
    )
    prompts = cut_prompts("code", text, lambda part: len(part.split()), (6, 16), "seed")
    assert len(prompts) > 3
    assert prompts == cut_prompts("code", text, lambda part: len(part.split()), (6, 16), "seed")
    for prompt in prompts:
        assert prompt.startswith("def function_")
        assert text[text.index(prompt) + len(prompt)] == "\n"
        assert 6 <= len(prompt.split()) <= 16


def test_prompts_hold_no_addresses() -> None:
    text = "entry\n\n" + "a word of it " * 10 + "someone@example.org " + "and more words " * 40
    assert cut_prompts("definitions", text, lambda part: len(part.split()), (45, 60), "seed") == []


def test_prompts_are_taken_from_every_document_in_turn() -> None:
    candidates = {"a": ["1", "2", "3"], "b": ["4"], "c": ["5", "1"]}
    assert choose(candidates, 4) == ["1", "4", "5", "2"]
    with pytest.raises(ValueError, match="only 5 prompts of 6"):
        choose(candidates, 6)
