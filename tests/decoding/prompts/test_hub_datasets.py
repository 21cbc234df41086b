"""Prompt sets from datasets on the hub, with a stand-in for the library `datasets`, and with the library if there."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from specgym.decoding.loading.hub_datasets import HUB_LIMIT, HUB_SETS, DatasetError
from specgym.decoding.prompts import load_prompts


class _Library(ModuleType):
    """`datasets` with made-up contents; remembers what was asked for."""

    def __init__(self, contents: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__("datasets")
        self.contents, self.calls = contents, list[tuple[str, str, str, bool]]()

    def load_dataset(self, path: str, config: str, *, split: str, streaming: bool) -> Any:
        self.calls.append((path, config, split, streaming))
        return iter(self.contents[split])


def _install(monkeypatch: pytest.MonkeyPatch, **contents: list[dict[str, Any]]) -> _Library:
    library = _Library(contents)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def _rows(column: str, word: str, count: int = 4) -> list[dict[str, Any]]:
    return [{column: f"{word} {number}"} for number in range(count)]


def test_wikitexts_own_splits_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(monkeypatch, train=_rows("page", "train"), test=_rows("page", "test"))
    result = load_prompts("wikitext", limit=3)
    assert result.train == ("train 0", "train 1", "train 2")
    assert result.test == ("test 0", "test 1", "test 2")
    place = ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1")
    assert library.calls == [(*place, "train", False), (*place, "test", False)]
    assert place[0] in result.source


def test_c4_is_streamed_and_judged_on_its_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(monkeypatch, train=_rows("text", "t", 10_000), validation=_rows("text", "v", 10_000))
    result = load_prompts("c4")
    assert library.calls == [("allenai/c4", "en", "train", True), ("allenai/c4", "en", "validation", True)]
    assert (len(result.train), len(result.test)) == (HUB_LIMIT, HUB_LIMIT)


def test_lambada_which_has_one_split_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(monkeypatch, test=_rows("text", "passage", 100))
    result = load_prompts("lambada", limit=20)
    assert library.calls == [("EleutherAI/lambada_openai", "default", "test", False)]
    assert (len(result.train), len(result.test)) == (20, 20)
    assert not set(result.train) & set(result.test)


@pytest.mark.parametrize(
    ("name", "row", "prompt", "calls"),
    [
        ("wmt16-de-en", {"translation": {"de": "Haus", "en": "house"}}, "Haus", ["train", "test"]),
        ("wmt14-en-de", {"translation": {"de": "Haus", "en": "house"}}, "house", ["train", "test"]),
        ("cnn_dailymail", {"article": "news", "highlights": "new"}, "news", ["train", "test"]),
        ("gsm8k", {"question": "how many?", "answer": "4"}, "how many?", ["train", "test"]),
        ("mt_bench", {"prompt": ["first", "second"]}, "first", ["train"]),
        ("openai_humaneval", {"prompt": "def f():", "test": "assert"}, "def f():", ["test"]),
    ],
)
def test_what_models_translate_sum_up_or_answer_is_read(
    name: str, row: dict[str, Any], prompt: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbered(value: Any, split: str) -> Any:
        if isinstance(value, dict):
            return {key: numbered(entry, split) for key, entry in value.items()}
        return [f"{entry} {split}" for entry in value] if isinstance(value, list) else f"{value} {split}"

    library = _install(monkeypatch, **{split: [numbered(row, f"{split} {i}") for i in "abcd"] for split in calls})
    result = load_prompts(name)
    assert [call[2] for call in library.calls] == calls
    assert set(result.train + result.test) == {f"{prompt} {split} {i}" for split in calls for i in "abcd"}
    assert result.chat == (name in ("gsm8k", "mt_bench"))
    column = {"wmt16-de-en": "house", "wmt14-en-de": "Haus", "cnn_dailymail": "new"}.get(name)
    for split in ("train", "test"):
        texts = tuple((text.replace(prompt, column, 1),) for text in result.split(split)) if column else ()
        assert result.references(split) == texts
    assert result.measure == ("rouge" if name == "cnn_dailymail" else "bleu")


def test_a_dataset_s_references_stay_with_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(article: str, highlights: Any) -> dict[str, Any]:
        return {"article": article, "highlights": highlights}

    rows = [row(" ", "lost"), row("a", "A"), row("a", "again"), row("b", ""), row("x " * 3000, "long")]
    _install(monkeypatch, train=[row("b", "B"), row("c", "C")], test=rows)
    result = load_prompts("cnn_dailymail")
    assert (result.train, result.train_references) == (("c",), (("C",),))
    assert [text[:3] for text in result.test] == ["a", "b", "x x"]  # a blank reference takes no prompt away
    assert result.test_references == (("A",), ("",), ("long",))
    _install(monkeypatch, train=[row("c", None)], test=rows)
    with pytest.raises(DatasetError, match="cnn_dailymail has no text in a column 'highlights' of its split 'train'"):
        load_prompts("cnn_dailymail")


def test_a_text_in_both_splits_of_a_dataset_is_left_to_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, train=[{"page": "both"}, {"page": "a"}], test=[{"page": "both"}, {"page": " "}])
    result = load_prompts("wikitext")
    assert (result.train, result.test) == (("a",), ("both",))


def test_a_long_document_is_cut_at_the_end_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, train=[{"page": "word " * 5000}], test=_rows("page", "test"))
    (prompt,) = load_prompts("wikitext").train
    assert 1990 < len(prompt) <= 2000
    assert prompt.endswith("word")


def test_a_document_keeps_the_whitespace_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, train=[{"page": "\n word "}], test=[{"page": " " * 5000}, {"page": f"  {'x ' * 3000}"}])
    result = load_prompts("wikitext")
    assert result.train == ("\n word ",)
    assert [text[:4] for text in result.test] == ["  x "]


@pytest.mark.parametrize("name", HUB_SETS)
def test_without_the_library_the_error_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r'pip install "specgym\[datasets\]"'):
        load_prompts(name)


def test_an_unreachable_dataset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(monkeypatch)

    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(library, "load_dataset", load_dataset, raising=False)
    with pytest.raises(DatasetError, match=r"allenai/c4 .*no route to host.*HF_ENDPOINT"):
        load_prompts("c4")


@pytest.mark.parametrize("rows", [[], [{"other": "x"}], [{"page": 1}]])
def test_a_dataset_that_has_changed_is_named(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, train=rows, test=rows)
    with pytest.raises(DatasetError, match=r"wikitext_document_level has no text in a column 'page'"):
        load_prompts("wikitext")


def test_the_genuine_library_reads_files_laid_out_like_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "EleutherAI" / "wikitext_document_level"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = "\n".join(json.dumps(row) for row in _rows("page", split))
        (folder / f"{split}.jsonl").write_text(rows)
    files = "".join(f"      - split: {split}\n        path: {split}.jsonl\n" for split in ("train", "test"))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n  - config_name: wikitext-2-raw-v1\n    data_files:\n{files}---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    result = load_prompts("wikitext", limit=2)
    assert (result.train, result.test) == (("train 0", "train 1"), ("test 0", "test 1"))
