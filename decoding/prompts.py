"""Sets of prompts, split into those that a tuner may learn from and those that only judge it.

A set comes from the package, from a local file, or, through the optional library ``datasets``, from the hub; all of
them end as the same `PromptSet`, which refuses to have a prompt on both sides. `loading/prompt_tokens.py` encodes it,
`loading/hub_datasets.py` reads the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from .errors import ArgumentError, SpecgymError, whole_number
from .loading.hub_datasets import HUB_LIMIT, HUB_SETS, PromptItem, fetch_texts
from .sealed_files import CHECKSUM, DamagedFileError, unsealed

Split = Literal["train", "test"]
Measure = Literal["bleu", "rouge"]
"""Measure of a text's likeness to its references: BLEU for translations, ROUGE for summaries."""
MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)
References = tuple[tuple[str, ...], ...]
"""References of each prompt of a split, one or several; empty where the split has none."""

_SHIPPED = Path(__file__).parent / "data" / "prompts"
FORMAT = "specgym-prompts-1"
"""Format of the shipped sets, which have a checksum; files of others need neither."""
_SUFFIXES = (".txt", ".jsonl", ".json")
_KNOWN_MEASURES = f"write one of {', '.join(MEASURES)}"
_TEST_SHARE = 0.25
_LINE_END = re.compile(r"\r?\n")  # str.splitlines knows ten more, all of which may stand in a JSON string or a prompt


class PromptFileError(SpecgymError, ValueError):
    """A prompt file or set cannot be used; the message names it and the way out."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts as text, which is kept exactly.

    Two prompts that differ only in whitespace at their ends are one that comes twice.

    Attributes:
        name: what `load_prompts` was given.
        train: prompts that tuning may see.
        test: prompts kept for judging; none of them is in `train`.
        source: where the texts come from.
        licence: under which they may be used.
        chat: whether each prompt is a user's message, to be put into a chat template where the tokenizer has one.
        train_references: texts that somebody else made of each training prompt, such as its translations; or nothing.
        test_references: likewise, of each test prompt. They judge texts, and are never read by a model.
        measure: what a text and its references are compared by.

    Raises:
        PromptFileError: a side is empty, a prompt is blank, comes twice or is no text; references are not texts, or
            not there for every prompt of their side; or there is no such measure.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    source: str
    licence: str
    chat: bool = False
    train_references: References = ()
    test_references: References = ()
    measure: Measure = "bleu"

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        if self.measure not in MEASURES:
            raise PromptFileError(f"prompt set {self.name!r} has the measure {self.measure!r}; {_KNOWN_MEASURES}")
        for split in ("train", "test"):
            prompts = self.split(split)
            if not prompts:
                raise PromptFileError(f"prompt set {self.name!r} has no {split} prompts; give at least one")
            for number, prompt in enumerate(prompts):
                here = f"{split}[{number}]"
                if not prompt.strip():
                    raise PromptFileError(f"prompt set {self.name!r}: {here} is blank; remove it")
                if earlier := seen.get(prompt.strip()):
                    raise PromptFileError(
                        f"prompt set {self.name!r}: {here} repeats {earlier} ({shorten(prompt)!r}); keep one of them"
                    )
                try:
                    prompt.encode()
                except UnicodeEncodeError as error:
                    raise PromptFileError(
                        f"prompt set {self.name!r}: {here} has half of a surrogate pair, {prompt[error.start]!r}, at "
                        f"character {error.start}, which no tokenizer reads; write the whole character, or remove it"
                    ) from None
                seen[prompt.strip()] = here
            self._check_references(split, len(prompts))

    def _check_references(self, split: str, prompts: int) -> None:
        references, name = self.references(split), f"prompt set {self.name!r}: {split}_references"
        if references and len(references) != prompts:
            raise PromptFileError(
                f"{name} has {len(references)} entries for {prompts} prompts; give one for each, or ()"
            )
        for number, texts in enumerate(references):
            if not isinstance(texts, tuple) or not texts or not all(isinstance(text, str) for text in texts):
                raise PromptFileError(f"{name}[{number}] is {texts!r}; give a tuple of strings, at least one")

    def split(self, split: str) -> tuple[str, ...]:
        """The prompts of ``"train"`` or ``"test"``; anything else is a ValueError."""
        if split == "train":
            return self.train
        if split == "test":
            return self.test
        raise ArgumentError(f"no split {split!r}: say 'train' or 'test'")

    def references(self, split: str) -> References:
        """References of ``"train"`` or ``"test"``, as many as prompts, or nothing; anything else is a ValueError."""
        self.split(split)  # which refuses any other name
        return self.train_references if split == "train" else self.test_references

    @property
    def digest(self) -> str:
        """SHA-256 of what is generated from: the prompts, their split and `chat` (64 hexadecimal digits).

        References are no part of it: recordings are matched by it, and hold good whatever texts are compared with.
        """
        contents = json.dumps({"train": self.train, "test": self.test, "chat": self.chat}, ensure_ascii=False)
        return hashlib.sha256(contents.encode("utf-8", "surrogatepass")).hexdigest()


def shipped_prompts() -> tuple[str, ...]:
    """The names of the sets inside this package, sorted."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))


def load_prompts(
    name: str, *, limit: int | None = None, chat: bool | None = None, measure: Measure | None = None
) -> PromptSet:
    """Load a set of prompts.

    Args:
        name: a shipped set (`shipped_prompts()`), a hub dataset (`HUB_SETS`: ``c4``, ``wmt16-de-en``...; needs
            ``specgym[datasets]`` and a network or a filled cache), or the path of a file: ``.txt`` (one prompt a line,
            or a paragraph where blank lines separate them), ``.jsonl`` (a string, or an object with "prompt", a line)
            or ``.json`` (a list of them, or an object with "train" and "test" lists). An object may also have the
            "messages" of a chat, if that is one message, a user's; and a "reference" (a string) or "references" (a list
            of them) that texts are compared with, if the prompts beside it have one, too.
        limit: at most so many prompts in each split, the first ones; by default all, of a hub dataset 512.
        chat: override whether the prompts are messages of a chat; files without a word on it are taken for plain text.
        measure: override what texts and references are compared by; ``"bleu"`` for files without a "measure".

    Files are UTF-8, with or without a byte order mark. Only LF and CRLF end a line, so that all other separators
    (U+2028, form feeds) stay in their prompt. A prompt is exactly the string of its file; in a ``.txt``, its line or
    lines without the line end, those between joined by LF.

    Files and datasets that have no test split are split here: a quarter, chosen by the hash of the text between its
    whitespace, is for testing. That is the same on every machine. Blank prompts are left out there, and repeated ones
    count once, with the references of the first.

    Raises:
        PromptFileError: unknown name, or a file that is missing, corrupt or of another format.
        DatasetError: the hub dataset cannot be had; the message says why.
        ArgumentError: the limit is no whole number of at least 1.
    """
    if limit is not None:
        limit = whole_number("limit", limit, hint="None for all prompts")
    path = Path(name).expanduser()
    if path.suffix.lower() in _SUFFIXES:
        prompts = _read(path, name)
    elif name in shipped_prompts():
        prompts = _read(_SHIPPED / f"{name}.json", name)
    elif name in HUB_SETS:
        limit = limit or HUB_LIMIT
        prompts = _from_hub(name, limit)
    else:
        known = [*shipped_prompts(), *HUB_SETS]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise PromptFileError(
            f"no prompt set {name!r}.{hint} Give one of {', '.join(known)}, or a file ending in {', '.join(_SUFFIXES)}"
        )
    return PromptSet(
        prompts.name,
        prompts.train[:limit],
        prompts.test[:limit],
        prompts.source,
        prompts.licence,
        prompts.chat if chat is None else chat,
        prompts.train_references[:limit],
        prompts.test_references[:limit],
        prompts.measure if measure is None else measure,
    )


def _from_hub(name: str, limit: int) -> PromptSet:
    texts, spec = fetch_texts(name, limit), HUB_SETS[name]
    # The dataset's own splits are kept; a text that is in both is left to the test.
    test = _unique(item.prompt for item in texts.test)
    judging = {text.strip() for text in test}
    train = [text for text in _unique(item.prompt for item in texts.train) if text.strip() not in judging]
    if not texts.train:
        train, test = _divide(test, name)
    of_train, of_test = _references_of(train, texts.train or texts.test), _references_of(test, texts.test)
    prompts = tuple(train), tuple(test)
    return PromptSet(name, *prompts, texts.source, texts.licence, spec.chat, of_train, of_test, spec.measure)


def _read(path: Path, name: str) -> PromptSet:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # text mode would take a lone CR, too, for a line's end
    except FileNotFoundError:
        raise PromptFileError(f"there is no prompt file {path}; give the path of one, or the name of a set") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"prompt file {path} cannot be read as UTF-8 text ({error}); save it as such") from error
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _from_list(pieces(text), path, name)
    if suffix == ".jsonl":
        lines = [(f"line {number}", line) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip()]
        values = [_parse(line, path, f", {place}") for place, line in lines]
        return _from_list(values, path, name, [place for place, _ in lines])
    value = _parse(text, path)
    if not isinstance(value, dict):
        return _from_list(value, path, name)
    try:
        return _from_object(unsealed(value, FORMAT), path, name)
    except DamagedFileError as error:
        raise PromptFileError(
            f"prompt file {path} is damaged ({error}); reinstall specgym if the package ships it, or, if you have "
            f'edited it, remove its "format" and "{CHECKSUM}"'
        ) from error


def pieces(text: str) -> list[str]:
    """The paragraphs of a text if blank lines separate any, else its lines."""
    lines = [line if line.strip() else "" for line in _LINE_END.split(text)]
    paragraphs = re.split(r"\n\n+", "\n".join(lines).strip("\n"))
    return paragraphs if len(paragraphs) > 1 else paragraphs[0].split("\n")


def _parse(text: str, path: Path, where: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"prompt file {path}{where} is not valid JSON ({error}); mend or replace it") from error


def _from_list(value: Any, path: Path, name: str, places: Sequence[str] = ()) -> PromptSet:
    """A file without splits of its own; places are names of its items, by default their numbers."""
    if not isinstance(value, list):
        raise PromptFileError(f"prompt file {path} holds {_kind(value)}; it should hold a list of prompts")
    items = _items(value, path, places or [f"prompt {number}" for number in range(1, len(value) + 1)])
    train, test = _divide(_unique(item.prompt for item in items), str(path))
    of_train, of_test = _references_of(train, items), _references_of(test, items)
    chat = _of_chat(value, path)
    return PromptSet(name, tuple(train), tuple(test), str(path), "unknown", chat, of_train, of_test)


def _from_object(value: dict[str, Any], path: Path, name: str) -> PromptSet:
    """A file in the format of the shipped ones."""
    sides = {}
    for split in ("train", "test"):
        if not isinstance(value.get(split), list):
            raise PromptFileError(f'prompt file {path} has no list "{split}"; a set has "train" and "test"')
        sides[split] = _items(value[split], path, [f"{split}[{number}]" for number in range(len(value[split]))])
    if not isinstance(value.get("chat", False), bool):
        raise PromptFileError(f'prompt file {path}: "chat" is {_kind(value["chat"])}; write true or false')
    if (measure := value.get("measure", "bleu")) not in MEASURES:
        raise PromptFileError(f'prompt file {path}: "measure" is {measure!r}; {_KNOWN_MEASURES}')
    source, licence = str(value.get("source", path)), str(value.get("licence", "unknown"))
    chat = value.get("chat", _of_chat([*value["train"], *value["test"]], path))
    train, test = (tuple(item.prompt for item in items) for items in sides.values())
    of_train, of_test = (tuple(item.references for item in items if item.references) for items in sides.values())
    return PromptSet(name, train, test, source, licence, chat, of_train, of_test, measure)


def _items(values: Sequence[Any], path: Path, places: Sequence[str]) -> list[PromptItem]:
    """Prompts with their references, which all of them have, or none."""
    items = [
        PromptItem(_text(value, path, place), _references(value, path, place))
        for value, place in zip(values, places, strict=True)
    ]
    with_some = [place for item, place in zip(items, places, strict=True) if item.references]
    without = [place for item, place in zip(items, places, strict=True) if not item.references]
    if with_some and without:
        raise PromptFileError(
            f"prompt file {path}: {without[0]} has no reference, and {with_some[0]} has one; write one for every "
            "prompt, or for none"
        )
    return items


def _text(item: Any, path: Path, where: str) -> str:
    text = item
    if _has_messages(item):
        messages = item["messages"]
        single = messages[0] if isinstance(messages, list) and len(messages) == 1 else None
        text = single.get("content") if isinstance(single, dict) and single.get("role") == "user" else None
        if not isinstance(text, str):
            raise PromptFileError(
                f"prompt file {path}: {where} holds a conversation, and only a single message of the user's, as text, "
                'can be put into a chat template here; give that as "prompt", or leave the others out of "messages"'
            )
    elif isinstance(item, dict):
        text = item.get("prompt")
    if not isinstance(text, str):
        raise PromptFileError(
            f'prompt file {path}: {where} is {_kind(text)}; a prompt is a string, or an object with the string "prompt"'
        )
    return text


def _references(item: Any, path: Path, place: str) -> tuple[str, ...]:
    """References of an item; none where it says nothing of them, or null."""
    keys = [key for key in ("reference", "references") if isinstance(item, dict) and item.get(key) is not None]
    if len(keys) > 1:
        raise PromptFileError(f'prompt file {path}: {place} has "reference" and "references"; write one of the two')
    value = item[keys[0]] if keys else []
    texts = value if isinstance(value, list) else [value]
    wrong = [_kind(text) for text in texts if not isinstance(text, str)]
    if wrong or (keys and not texts):
        held = wrong[0] if wrong else "an empty list"
        raise PromptFileError(
            f'prompt file {path}: {place} has {held} as "{keys[0]}"; write a string, or a list of strings'
        )
    if not all(map(str.strip, texts)):
        raise PromptFileError(f'prompt file {path}: {place} has a blank "{keys[0]}"; write what the text should be')
    return tuple(texts)


def _references_of(prompts: Sequence[str], items: Sequence[PromptItem]) -> References:
    """References of some prompts, in their order; those of the first item where an item comes again."""
    known: dict[str, tuple[str, ...]] = {}
    for item in items:
        known.setdefault(item.prompt, item.references)
    return tuple(known[prompt] for prompt in prompts if known[prompt])


def _has_messages(item: Any) -> bool:
    return isinstance(item, dict) and "messages" in item and "prompt" not in item


def _of_chat(items: list[Any], path: Path) -> bool:
    """True if the prompts are messages of a chat, as far as their form says."""
    chat = set(map(_has_messages, items))
    if len(chat) > 1:
        raise PromptFileError(
            f'prompt file {path} has prompts with "messages", which go into a chat template, beside plain ones; write '
            'all in the same form, or "prompt" and "chat" in an object with "train" and "test"'
        )
    return True in chat


def _divide(prompts: list[str], name: str) -> tuple[list[str], list[str]]:
    """Train and test, in the order given; the hash of a prompt alone ranks it, so neighbours do not go together.

    Whitespace at its ends does not count, as it does not where prompts repeat each other.
    """
    if len(prompts) < 2:
        raise PromptFileError(f"{name} has {len(prompts)} different prompts; at least 2 are needed to split off a test")
    ranked = sorted(
        prompts, key=lambda prompt: hashlib.sha256(prompt.strip().encode("utf-8", "surrogatepass")).digest()
    )
    chosen = set(ranked[: max(1, round(len(prompts) * _TEST_SHARE))])
    return [prompt for prompt in prompts if prompt not in chosen], [prompt for prompt in prompts if prompt in chosen]


def _unique(prompts: Iterable[str]) -> list[str]:
    """Prompts that are not blank, in their order, the first of those that differ only in whitespace at their ends."""
    unique: dict[str, str] = {}
    for prompt in prompts:
        unique.setdefault(prompt.strip(), prompt)
    unique.pop("", None)
    return list(unique.values())


def _kind(value: Any) -> str:
    return {"dict": "an object", "list": "a list", "str": "a string", "NoneType": "missing or null"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def shorten(text: str, width: int = 40) -> str:
    """Return the beginning of a text, for messages."""
    return text if len(text) <= width else text[: width - 1] + "…"
