"""Sets of prompts, split into those that a tuner may learn from and those that only judge it.

A set comes from the package, from a local file, or, through the optional library ``datasets``, from the hub; all of
them end as the same `PromptSet`, which refuses to have a prompt on both sides. `loading/prompt_tokens.py` encodes it.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import ArgumentError, SpecgymError, whole_number
from .sealed_files import CHECKSUM, DamagedFileError, unsealed

Split = Literal["train", "test"]

_SHIPPED = Path(__file__).parent / "data" / "prompts"
FORMAT = "specgym-prompts-1"
"""Format of the shipped sets, which have a checksum; files of others need neither."""
_SUFFIXES = (".txt", ".jsonl", ".json")
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

    Raises:
        PromptFileError: a side is empty, a prompt is blank, comes twice or is no text.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    source: str
    licence: str
    chat: bool = False

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
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

    def split(self, split: str) -> tuple[str, ...]:
        """The prompts of ``"train"`` or ``"test"``; anything else is a ValueError."""
        if split == "train":
            return self.train
        if split == "test":
            return self.test
        raise ArgumentError(f"no split {split!r}: say 'train' or 'test'")

    @property
    def digest(self) -> str:
        """SHA-256 of what is generated from: the prompts, their split and `chat` (64 hexadecimal digits)."""
        contents = json.dumps({"train": self.train, "test": self.test, "chat": self.chat}, ensure_ascii=False)
        return hashlib.sha256(contents.encode("utf-8", "surrogatepass")).hexdigest()


def shipped_prompts() -> tuple[str, ...]:
    """The names of the sets inside this package, sorted."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))


def load_prompts(name: str, *, limit: int | None = None, chat: bool | None = None) -> PromptSet:
    """Load a set of prompts.

    Args:
        name: a shipped set (`shipped_prompts()`), a hub dataset (`HUB_SETS`: ``c4``, ``wmt16-de-en``...; needs
            ``specgym[datasets]`` and a network or a filled cache), or the path of a file: ``.txt`` (one prompt a line,
            or a paragraph where blank lines separate them), ``.jsonl`` (a string, or an object with "prompt", a line)
            or ``.json`` (a list of them, or an object with "train" and "test" lists). An object may also have the
            "messages" of a chat, if that is one message, a user's.
        limit: at most so many prompts in each split, the first ones; by default all, of a hub dataset 512.
        chat: override whether the prompts are messages of a chat; files without a word on it are taken for plain text.

    Files are UTF-8, with or without a byte order mark. Only LF and CRLF end a line, so that all other separators
    (U+2028, form feeds) stay in their prompt. A prompt is exactly the string of its file; in a ``.txt``, its line or
    lines without the line end, those between joined by LF.

    Files and datasets that have no test split are split here: a quarter, chosen by the hash of the text between its
    whitespace, is for testing. That is the same on every machine. Blank prompts are left out there, and repeated ones
    count once.

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
    )


def _from_hub(name: str, limit: int) -> PromptSet:
    texts = fetch_texts(name, limit)
    # The dataset's own splits are kept; a text that is in both is left to the test.
    test = _unique(texts.test)
    judging = {text.strip() for text in test}
    train = [text for text in _unique(texts.train) if text.strip() not in judging]
    if not texts.train:
        train, test = _divide(test, name)
    return PromptSet(name, tuple(train), tuple(test), texts.source, texts.licence, HUB_SETS[name].chat)


def _read(path: Path, name: str) -> PromptSet:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # text mode would take a lone CR, too, for a line's end
    except FileNotFoundError:
        raise PromptFileError(f"there is no prompt file {path}; give the path of one, or the name of a set") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"prompt file {path} cannot be read as UTF-8 text ({error}); save it as such") from error
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _from_list(_pieces(text), path, name)
    if suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip()]
        return _from_list([_parse(line, path, f", line {number}") for number, line in lines], path, name)
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


def _pieces(text: str) -> list[str]:
    """The paragraphs of a text if blank lines separate any, else its lines."""
    lines = [line if line.strip() else "" for line in _LINE_END.split(text)]
    paragraphs = re.split(r"\n\n+", "\n".join(lines).strip("\n"))
    return paragraphs if len(paragraphs) > 1 else paragraphs[0].split("\n")


def _parse(text: str, path: Path, where: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"prompt file {path}{where} is not valid JSON ({error}); mend or replace it") from error


def _from_list(value: Any, path: Path, name: str) -> PromptSet:
    """A file without splits of its own."""
    if not isinstance(value, list):
        raise PromptFileError(f"prompt file {path} holds {_kind(value)}; it should hold a list of prompts")
    prompts = [_text(item, path, f"prompt {number}") for number, item in enumerate(value, 1)]
    train, test = _divide(_unique(prompts), str(path))
    return PromptSet(name, tuple(train), tuple(test), str(path), "unknown", _of_chat(value, path))


def _from_object(value: dict[str, Any], path: Path, name: str) -> PromptSet:
    """A file in the format of the shipped ones."""
    sides = {}
    for split in ("train", "test"):
        if not isinstance(value.get(split), list):
            raise PromptFileError(f'prompt file {path} has no list "{split}"; a set has "train" and "test"')
        sides[split] = tuple(_text(item, path, f"{split}[{number}]") for number, item in enumerate(value[split]))
    if not isinstance(value.get("chat", False), bool):
        raise PromptFileError(f'prompt file {path}: "chat" is {_kind(value["chat"])}; write true or false')
    source, licence = str(value.get("source", path)), str(value.get("licence", "unknown"))
    chat = value.get("chat", _of_chat([*value["train"], *value["test"]], path))
    return PromptSet(name, sides["train"], sides["test"], source, licence, chat)


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


def _unique(prompts: list[str]) -> list[str]:
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


HUB_LIMIT = 512
_CHARACTERS = 2000  # of a document; the beginning of one is a prompt, the whole of it would fill any context


class DatasetError(SpecgymError, RuntimeError):
    """A hub dataset cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class HubSet:
    """Place of a dataset on the hub, and its column of text or the path to it; of several turns the first."""

    path: str
    config: str
    column: str
    train: str | None  # the dataset's own splits; None where it has but one
    test: str
    licence: str
    streamed: bool = False  # too large to download for a few hundred prompts
    chat: bool = False


@dataclass(frozen=True)
class HubTexts:
    """Texts as they came; `train` is empty where the dataset has no such split."""

    train: list[str]
    test: list[str]
    source: str
    licence: str


HUB_SETS: dict[str, HubSet] = {
    "lambada": HubSet("EleutherAI/lambada_openai", "default", "text", None, "test", "MIT (modified)"),
    "wikitext": HubSet(
        "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "page", "train", "test", "CC BY-SA 3.0"
    ),
    "c4": HubSet("allenai/c4", "en", "text", "train", "validation", "ODC-BY 1.0", streamed=True),
    "cnn_dailymail": HubSet("abisee/cnn_dailymail", "3.0.0", "article", "train", "test", "Apache 2.0", streamed=True),
    "gsm8k": HubSet("openai/gsm8k", "main", "question", "train", "test", "MIT", chat=True),
    "mt_bench": HubSet("HuggingFaceH4/mt_bench_prompts", "default", "prompt", None, "train", "Apache 2.0", chat=True),
    "openai_humaneval": HubSet("openai/openai_humaneval", "openai_humaneval", "prompt", None, "test", "MIT"),
    **{
        f"{year}-{source}-{other}": HubSet(
            f"wmt/{year}", "de-en", f"translation.{source}", "train", "test", "unknown", streamed=True
        )
        for year in ("wmt14", "wmt16")
        for source, other in (("de", "en"), ("en", "de"))
    },
}


def fetch_texts(name: str, limit: int = HUB_LIMIT) -> HubTexts:
    """The first texts of a hub dataset's splits, each cut to its first 2000 characters at a word's end.

    Args:
        name: a key of `HUB_SETS`.
        limit: at most so many texts a split. A dataset with one split gives four times as many, to be divided.

    Raises:
        DatasetError: the library is missing, the dataset cannot be reached, or it is not as expected.
    """
    spec = HUB_SETS[name]
    train = [] if spec.train is None else _texts(spec, spec.train, limit)
    test = _texts(spec, spec.test, limit if spec.train else 4 * limit)
    return HubTexts(train, test, f"{spec.path} ({spec.config})", spec.licence)


def _texts(spec: HubSet, split: str, most: int) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(
            f'the dataset {spec.path} needs the library "datasets": pip install "specgym[datasets]", or use a shipped '
            "prompt set or a file of your own"
        ) from error
    try:
        rows: Any = load_dataset(spec.path, spec.config, split=split, streaming=spec.streamed)
        taken = list(itertools.islice(rows, most))
    except Exception as error:  # network, hub and file-format errors of several libraries come through here
        raise DatasetError(
            f"the dataset {spec.path} ({spec.config}, {split}) cannot be loaded ({type(error).__name__}: {error}); "
            "check the network or HF_ENDPOINT, or save its texts to a .jsonl file and give that"
        ) from error
    texts = [_entry(row, spec.column) for row in taken]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DatasetError(
            f"the dataset {spec.path} has no text in a column {spec.column!r} of its split {split!r}: it has changed; "
            "save its texts to a .jsonl file and give that"
        )
    return [_beginning(text) for text in texts if text.strip()]


def _entry(row: Any, path: str) -> Any:
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row[0] if isinstance(row, list) and row else row


def _beginning(text: str) -> str:
    if len(text) <= _CHARACTERS:
        return text
    head = text[:_CHARACTERS]
    return head.rsplit(maxsplit=1)[0] if any(character.isspace() for character in head.strip()) else head
