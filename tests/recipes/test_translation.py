"""The toy translator: what is read of a wheel, batches of sentence pairs, and prompts."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from recipes.translation import InterfaceSettings, SentencePair, choose_prompts, read_sentences, write_prompts
from recipes.translator import SentenceBatches
from specgym.decoding import load_prompts
from specgym.decoding.errors import FitError


def test_pairs_are_read_once_and_what_is_alike_is_on_one_side(tmp_path: Path) -> None:
    texts = {f"text{number}": f"Open the door of room {letter * 3}" for number, letter in enumerate("abcdefghijklmnop")}
    english = {"state": texts, "same": "Wi-Fi router", "link": "See https://example.org now", "one": "Turn it on"}
    german = {
        "state": {key: f"Tür {value}" for key, value in texts.items()},
        "same": "Wi-Fi router",
        "one": "Schalte ein",
    }
    german["link"] = "Siehe https://example.org jetzt"
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for place in ("a", "b"):
            archive.writestr(
                f"{place}/translations/en.json", json.dumps({**english, "more": f"Turn it ON {place == 'b'}"})
            )
            archive.writestr(f"{place}/translations/de.json", json.dumps({**german, "more": "Schalte es ein"}))
    sentences = read_sentences(wheel)
    pairs = [*sentences.train, *sentences.held_out]
    read = {pair.english for pair in pairs}
    assert len(read) == len(pairs) == len(texts) + 3
    assert not {"Wi-Fi router", "See https://example.org now"} & read
    assert SentencePair("Turn it on", "Schalte ein") in pairs
    assert sentences.held_out or len(sentences.train) == len(pairs)


def test_an_epoch_has_every_pair_once_in_batches_that_are_not_too_large() -> None:
    pairs = [([1] * (1 + number % 7), [2] * (1 + number % 11)) for number in range(200)]
    batches = SentenceBatches(pairs, 64, seed=0)
    steps = len(batches._ends) - 1
    first = [batches(step) for step in range(steps)]
    assert sorted(torch.cat(first).tolist()) == list(range(200))
    assert max(sum(len(pairs[number][0]) + len(pairs[number][1]) for number in batch) for batch in first) <= 1.3 * 64
    assert not all(map(torch.equal, first, [batches(steps + step) for step in range(steps)]))
    assert all(map(torch.equal, first, [batches(step) for step in range(steps)]))


def test_prompts_are_long_and_on_one_side_each() -> None:
    pairs = [SentencePair("x" * (40 + number), str(number)) for number in range(60)]
    train, test = choose_prompts(pairs, 10, 8, 60, seed=0)
    assert (len(train), len(test), len({*train, *test})) == (10, 8, 18)
    assert all(len(pair.english) >= 60 for pair in (*train, *test))
    with pytest.raises(FitError, match="40 held-out texts have 60 characters, and 41 are needed"):
        choose_prompts(pairs, 40, 1, 60, seed=0)


def test_a_prompt_set_has_the_translations_as_references(tmp_path: Path) -> None:
    pairs = [SentencePair(f"text {number}", f"Text {number}") for number in range(9)]
    write_prompts(InterfaceSettings(tmp_path / "some.json", train=3, test=2, shortest=1), pairs)
    written = load_prompts(str(tmp_path / "some.json"))
    assert (len(written.train), len(written.test), written.measure) == (3, 2, "bleu")
    for split in ("train", "test"):
        assert written.references(split) == tuple((prompt.title(),) for prompt in written.split(split))
