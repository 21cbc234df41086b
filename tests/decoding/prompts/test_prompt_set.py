"""Prompt sets: shipped and from files; their text, kept exactly; their split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding import prompts as prompts_module
from specgym.decoding.prompts import PromptFileError, PromptSet, load_prompts, shipped_prompts

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file, its line ends as they are; returns its path."""

    def write(name: str, content: str) -> str:
        (tmp_path / name).write_bytes(content.encode())
        return str(tmp_path / name)

    return write


def _set(train: tuple[str, ...] = ("a",), test: tuple[str, ...] = ("b",), chat: bool = False) -> PromptSet:
    return PromptSet("made", train, test, source="here", licence="CC0-1.0", chat=chat)


# Shipped sets


@pytest.mark.parametrize("name", shipped_prompts())
def test_every_shipped_set_is_complete(name: str) -> None:
    shipped = load_prompts(name)
    assert shipped.name == name
    assert len(shipped.train) >= 32
    assert len(shipped.test) >= 24
    assert shipped.source
    assert shipped.licence not in ("", "unknown")


def test_the_chat_set_is_large_enough_and_marked_as_chat() -> None:
    chat = load_prompts("chat")
    assert chat.chat
    assert len(chat.train) >= 40
    assert len(chat.test) >= 32


def test_a_limit_keeps_the_first_prompts_of_each_split() -> None:
    whole, few = load_prompts("chat"), load_prompts("chat", limit=3)
    assert (few.train, few.test) == (whole.train[:3], whole.test[:3])
    with pytest.raises(ValueError, match="limit must be a whole number of at least 1, got 0"):
        load_prompts("chat", limit=0)


def test_an_unknown_name_lists_the_known_ones_and_a_close_one() -> None:
    with pytest.raises(PromptFileError, match=r"Did you mean 'chat'.*lambada.*\.jsonl"):
        load_prompts("chatt")


# The set itself


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [
        ((), ("b",), "no train prompts"),
        (("a",), (), "no test prompts"),
        (("a", " "), ("b",), r"train\[1\] is blank"),
        (("a",), ("b", "a"), r"test\[1\] repeats train\[0\]"),
        (("a",), (" a\n",), r"test\[0\] repeats train\[0\]"),
        (("a", "a"), ("b",), r"train\[1\] repeats train\[0\]"),
        (("a", "b\ud83d"), ("c",), r"train\[1\] has half of a surrogate pair, '.ud83d', at character 1"),
    ],
)
def test_a_set_refuses_what_would_spoil_a_comparison(train: Any, test: Any, reason: str) -> None:
    with pytest.raises(PromptFileError, match=f"'made'.*{reason}"):
        _set(train, test)


def test_a_split_has_one_of_two_names() -> None:
    with pytest.raises(ValueError, match="'train' or 'test'"):
        _set().split("validation")


def test_the_digest_depends_on_the_contents_only() -> None:
    base = _set().digest
    assert base == PromptSet("other", ("a",), ("b",), "elsewhere", "MIT").digest
    others = {_set(("b",), ("a",)).digest, _set(("a", "c")).digest, _set(chat=True).digest, _set(("ä",)).digest}
    assert len({base, *others}) == 5


def test_references_are_no_part_of_a_set_s_digest() -> None:
    bare = PromptSet("made", ("a",), ("b", "c"), "here", "MIT")
    judged = PromptSet("made", ("a",), ("b", "c"), "here", "MIT", test_references=(("x",), ("y", "z")), measure="rouge")
    assert judged.digest == bare.digest
    assert (judged.references("train"), judged.references("test")) == ((), (("x",), ("y", "z")))
    # Recordings of earlier versions, whose set had none, are matched by this.
    shipped = load_prompts("interface")
    assert shipped.digest == "a7938367130b7b3824bbee302fe45572f03e1c1e6e8fe37b2fcbcfbf9d25e230"
    assert [*map(len, (shipped.references("train"), shipped.references("test")))] == [40, 32]
    assert (shipped.measure, shipped.train[0], shipped.train_references[0]) == (
        "bleu",
        "Your VIZIO SmartCast device is now connected to Home Assistant.",
        ("Dein VIZIO SmartCast-Gerät ist jetzt mit Home Assistant verbunden.",),
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"test_references": (("x",), ("y",))}, "test_references has 2 entries for 1 prompts; give one for each"),
        ({"train_references": ("x",)}, r"train_references\[0\] is 'x'; give a tuple of strings, at least one"),
        ({"test_references": ((),)}, r"test_references\[0\] is \(\)"),
        ({"test_references": ((1,),)}, r"test_references\[0\] is \(1,\)"),
        ({"measure": "f1"}, "has the measure 'f1'; write one of bleu, rouge"),
    ],
)
def test_a_set_refuses_references_that_are_none(more: Any, reason: str) -> None:
    with pytest.raises(PromptFileError, match=f"'made'.*{reason}"):
        PromptSet("made", ("a",), ("b",), "here", "MIT", **more)


# Files


def test_a_text_file_has_one_prompt_a_line(write: Write) -> None:
    result = load_prompts(write("mine.txt", "one\ntwo\n three \nfour\n"))
    assert {*result.train, *result.test} == {"one", "two", " three ", "four"}
    assert not result.chat


def test_a_text_file_with_blank_lines_has_one_prompt_a_paragraph(write: Write) -> None:
    result = load_prompts(write("mine.txt", "\n\n    one\nstill one \n \n\ntwo\n"))
    assert {*result.train, *result.test} == {"    one\nstill one ", "two"}


def test_a_jsonl_file_has_one_object_a_line(write: Write) -> None:
    path = write("mine.jsonl", '{"prompt": "one", "id": 1}\n\n"two"\n{"prompt": "thr\\u00e9e"}\n')
    result = load_prompts(path, chat=True)
    assert {*result.train, *result.test} == {"one", "two", "thrée"}
    assert result.chat


def test_a_json_list_and_the_same_jsonl_are_the_same_set(write: Write) -> None:
    texts = [f"prompt {number}" for number in range(9)]
    as_list = load_prompts(write("a.json", json.dumps([{"prompt": text} for text in texts])))
    as_lines = load_prompts(write("b.jsonl", "\n".join(json.dumps(text) for text in texts)))
    assert as_list.digest == as_lines.digest


SEPARATORS = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r")
"""Ends of lines for `str.splitlines`, and in part for text mode, but neither for JSON Lines nor for an editor."""


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_only_the_ends_of_lines_end_a_prompt(write: Write, name: str, separator: str) -> None:
    texts = [f"one{separator}still one", f"{separator}two", "three"]
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    content = {"a.txt": "\n".join(texts), "a.jsonl": "\n".join(lines), "a.json": f"[{','.join(lines)}]"}[name]
    result = load_prompts(write(name, content))
    assert {*result.train, *result.test} == set(texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_text(write: Write, name: str) -> None:
    content = {"a.txt": "one\nstill one\n\ntwo\n", "a.jsonl": '"one"\n\n"two"\n', "a.json": '[\n"one",\n"two"]\n'}[name]
    plain = load_prompts(write(name, content))
    assert load_prompts(write(name, "\ufeff" + content.replace("\n", "\r\n"))).digest == plain.digest


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "set.json"])
def test_whitespace_at_the_ends_of_a_prompt_is_kept(write: Write, name: str) -> None:
    texts = [" one", "two\n", "\tthree\u2028", "four"]
    contents: dict[str, Any] = {"list.json": texts, "set.json": {"train": texts[:2], "test": texts[2:]}}
    content = "\n".join(map(json.dumps, texts)) if name == "a.jsonl" else json.dumps(contents[name])
    result = load_prompts(write(name, content))
    assert {*result.train, *result.test} == set(texts)


def test_whitespace_moves_no_prompt_to_the_other_side(write: Write) -> None:
    texts = [f"prompt {number}" for number in range(20)]
    plain = load_prompts(write("a.json", json.dumps(texts)))
    spaced = load_prompts(write("b.json", json.dumps([f" {text}\n" for text in texts])))
    assert [text.strip() for text in spaced.test] == list(plain.test)
    twice = load_prompts(write("c.json", json.dumps([*texts, *(f" {text}" for text in texts), " "])))
    assert twice.digest == plain.digest


def test_single_messages_of_a_user_are_a_chat(write: Write) -> None:
    rows = [{"messages": [{"role": "user", "content": text}], "id": 1} for text in ("one ", "two")]
    result = load_prompts(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    assert {*result.train, *result.test} == {"one ", "two"}
    assert result.chat
    assert load_prompts(write("b.json", json.dumps({"train": rows[:1], "test": rows[1:]}))).chat
    assert not load_prompts(write("b.json", json.dumps({"train": rows[:1], "test": rows[1:], "chat": False}))).chat


def test_references_stay_with_their_prompts(write: Write) -> None:
    pairs = {f"prompt {number}": f"text {number}" for number in range(9)}
    rows = [{"prompt": prompt, "reference": text, "note": 1} for prompt, text in pairs.items()]
    lines = load_prompts(write("a.jsonl", "\n".join(map(json.dumps, [*rows, {**rows[0], "reference": "another"}]))))
    for split in ("train", "test"):
        assert lines.references(split) == tuple((pairs[prompt],) for prompt in lines.split(split))
    assert lines.digest == load_prompts(write("b.json", json.dumps([*pairs]))).digest
    few = load_prompts(write("a.jsonl", "\n".join(map(json.dumps, rows))), limit=1, measure="rouge")
    assert (few.references("test"), few.measure) == (lines.references("test")[:1], "rouge")
    message = {"messages": [{"role": "user", "content": "sum up"}], "references": ["short", "brief"]}
    value = {"train": [{"prompt": "x", "reference": None}], "test": [{**message, "prompt": "y"}], "measure": "rouge"}
    judged = load_prompts(write("c.json", json.dumps(value)))
    assert (judged.references("train"), judged.references("test")) == ((), (("short", "brief"),))
    assert judged.measure == "rouge"
    other = {**message, "messages": [{"role": "user", "content": "another"}]}
    chat = load_prompts(write("d.jsonl", f"{json.dumps(message)}\n{json.dumps(other)}"))
    assert chat.chat
    assert chat.references("test") == (("short", "brief"),)


def test_a_json_file_with_splits_keeps_them(write: Write) -> None:
    value = {"train": ["a", "b"], "test": [{"prompt": "c"}], "chat": True, "source": "me", "licence": "MIT"}
    result = load_prompts(write("mine.json", json.dumps(value)))
    assert (result.train, result.test, result.chat, result.source, result.licence) == (
        ("a", "b"),
        ("c",),
        True,
        "me",
        "MIT",
    )
    assert not load_prompts(write("mine.json", json.dumps(value)), chat=False).chat


def test_a_file_is_never_hidden_by_a_shipped_set(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("chat.json", '["x", "y"]')
    monkeypatch.chdir(tmp_path)
    assert {*load_prompts("chat.json").train, *load_prompts("chat.json").test} == {"x", "y"}
    assert len(load_prompts("chat").train) >= 40


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '"text"', "a string"),
        ("a.json", "[1, 2]", "prompt 1 is a int"),
        ("a.json", '{"tokenizer": {}}', 'no list "train"'),
        ("a.json", '{"train": ["a"], "test": "b"}', 'no list "test"'),
        ("a.json", '{"train": ["a"], "test": [null]}', r"test\[0\] is missing or null"),
        ("a.json", '{"train": ["a"], "test": ["b"], "chat": "yes"}', '"chat" is a string'),
        ("a.jsonl", '{"prompt": "a"}\nb\n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "line 3 is missing or null"),
        ("a.txt", "only one\nonly one\n", "1 different prompts"),
        ("a.txt", "\n", "0 different prompts"),
        ("a.json", '["a", "\\ud83d"]', "half of a surrogate pair"),
        ("a.json", '[{"messages": []}]', "prompt 1 holds a conversation"),
        ("a.json", '[{"messages": [{"role": "system", "content": "x"}]}]', "prompt 1 holds a conversation.*leave the"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n"b"\n', "beside plain ones"),
        ("a.jsonl", '{"prompt": "a", "reference": 1}\n', 'line 1 has a int as "reference"; write a string, or a list'),
        ("a.jsonl", '{"prompt": "a", "references": ["x", {}]}\n', 'line 1 has an object as "references"'),
        ("a.jsonl", '{"prompt": "a", "references": []}\n', 'line 1 has an empty list as "references"'),
        ("a.jsonl", '{"prompt": "a", "reference": " "}\n', 'line 1 has a blank "reference"; write what'),
        (
            "a.jsonl",
            '{"prompt": "a", "reference": "x", "references": ["x"]}\n',
            'line 1 has "reference" and "references"',
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "reference": "x"}\n\n"b"\n',
            "line 3 has no reference, and line 1 has one; write one",
        ),
        ("a.json", '["a", {"prompt": "b", "reference": "x"}]', "prompt 1 has no reference, and prompt 2 has one"),
        ("a.json", '{"train": ["a"], "test": ["b", {"prompt": "c", "reference": "x"}]}', r"test\[0\] has no reference"),
        ("a.json", '{"train": ["a"], "test": ["b"], "measure": "f1"}', "\"measure\" is 'f1'; write one of bleu, rouge"),
    ],
)
def test_a_corrupt_or_foreign_file_is_refused_by_name(write: Write, name: str, content: str, reason: str) -> None:
    with pytest.raises(PromptFileError, match=rf"{name}.*{reason}"):
        load_prompts(write(name, content))


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptFileError, match=r"a\.txt cannot be read as UTF-8"):
        load_prompts(str(tmp_path / "a.txt"))
    with pytest.raises(PromptFileError, match=r"no prompt file .*b\.txt"):
        load_prompts(str(tmp_path / "b.txt"))


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, unique_by=str.strip, max_size=40))
def test_a_division_is_complete_disjoint_and_blind_to_the_order(texts: list[str]) -> None:
    train, test = prompts_module._divide(texts, "x")
    assert sorted(train + test) == sorted(texts)
    assert not set(train) & set(test)
    assert train
    assert test
    assert set(prompts_module._divide(texts[::-1], "x")[1]) == set(test)


def test_a_quarter_is_for_testing() -> None:
    assert len(prompts_module._divide([str(number) for number in range(100)], "x")[1]) == 25


def test_a_shipped_set_that_was_changed_is_refused_and_one_of_a_user_needs_no_checksum(tmp_path: Path) -> None:
    shipped = json.loads((Path(prompts_module.__file__).parent / "data" / "prompts" / "chat.json").read_text("utf-8"))
    path = tmp_path / "mine.json"
    shipped["train"][0] += "!"
    path.write_text(json.dumps(shipped))
    with pytest.raises(PromptFileError, match=r'mine\.json is damaged .*remove its "format" and "sha256"'):
        load_prompts(str(path))
    del shipped["format"], shipped["sha256"]
    path.write_text(json.dumps(shipped))
    assert load_prompts(str(path)).train[0] == shipped["train"][0]
