"""Sets of prompts, split into those that a tuner may learn from and those that only judge it.

A set comes from the package, from a local file, or from a dataset on the hub (`hub_prompts.py`); all of them end as the
same `PromptSet`, which refuses to have a prompt on both sides.

Prompt texts from datasets on the Hugging Face hub, through the optional library ``datasets``.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import PromptError, SpecgymError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]

_SHIPPED = Path(__file__).parent / "data" / "prompts"
_SUFFIXES = (".txt", ".jsonl", ".json")
_TEST_SHARE = 0.25


class PromptFileError(SpecgymError, ValueError):
    """A prompt file or set cannot be used; the message names it and the way out."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts as text.

    Attributes:
        name: what `load_prompts` was given.
        train: prompts that tuning may see.
        test: prompts kept for judging; none of them is in `train`.
        source: where the texts come from.
        licence: under which they may be used.
        chat: whether each prompt is a user's message, to be put into a chat template where the tokenizer has one.

    Raises:
        PromptFileError: a side is empty, a prompt is blank or comes twice.
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
                        f"prompt set {self.name!r}: {here} repeats {earlier} ({_shorten(prompt)!r}); keep one of them"
                    )
                seen[prompt.strip()] = here

    def split(self, split: str) -> tuple[str, ...]:
        """The prompts of ``"train"`` or ``"test"``; anything else is a ValueError."""
        if split == "train":
            return self.train
        if split == "test":
            return self.test
        raise ValueError(f"no split {split!r}: say 'train' or 'test'")

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
        name: a shipped set (`shipped_prompts()`), a hub dataset (``lambada``, ``wikitext``, ``c4``; needs
            ``specgym[datasets]`` and a network or a filled cache), or the path of a file: ``.txt`` (one prompt a line,
            or a paragraph where blank lines separate them), ``.jsonl`` (one object with "prompt" a line) or ``.json``
            (a list of strings or such objects, or an object with "train" and "test" lists).
        limit: at most so many prompts in each split, the first ones; by default all, of a hub dataset 512.
        chat: override whether the prompts are messages of a chat; files without a word on it are taken for plain text.

    Files and datasets that have no test split are split here: a quarter, chosen by the hash of the text, is for
    testing. That is the same on every machine, and repeated prompts count once.

    Raises:
        PromptFileError: unknown name, or a file that is missing, corrupt or of another format.
        DatasetError: the hub dataset cannot be had; the message says why.
        ValueError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no prompts; give at least 1, or None for all")
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


def encode(prompt_set: PromptSet, split: Split, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[list[int]]:
    """Token ids of every prompt of a split, in order, each 1 to `max_tokens` long.

    A chat set goes through the tokenizer's chat template, up to where the assistant is to speak; without a template
    its prompts are plain text. What is too long loses its beginning (a leading BOS token stays), because the model
    continues from the end.

    Raises:
        PromptError: a prompt has no tokens.
        ValueError: `max_tokens` is below 2, or the split is neither "train" nor "test".
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens} leaves no room for a prompt; give at least 2")
    templated = prompt_set.chat and bool(getattr(tokenizer, "chat_template", None))
    encoded = []
    for number, prompt in enumerate(prompt_set.split(split)):
        ids: list[int]
        if templated:
            message = [{"role": "user", "content": prompt}]
            reply: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            ids = list(reply)
        else:
            # Cut below, and by us: the tokenizer's own truncation would warn of, or apply, limits of its own.
            ids = list(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
        if not ids:
            raise PromptError(
                f"prompt set {prompt_set.name!r}: {split}[{number}] ({_shorten(prompt)!r}) has no tokens with this "
                "tokenizer; remove it"
            )
        if len(ids) > max_tokens:
            leads = ids[0] == tokenizer.bos_token_id and not templated
            ids = ids[:1] + ids[len(ids) - max_tokens + 1 :] if leads else ids[-max_tokens:]
        encoded.append(ids)
    return encoded


def _from_hub(name: str, limit: int) -> PromptSet:
    texts = fetch_texts(name, limit)
    # The dataset's own splits are kept; a text that is in both is left to the test.
    test = _unique(texts.test)
    train = [text for text in _unique(texts.train) if text not in set(test)]
    if not texts.train:
        train, test = _divide(test, name)
    return PromptSet(name, tuple(train), tuple(test), texts.source, texts.licence)


def _read(path: Path, name: str) -> PromptSet:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PromptFileError(f"there is no prompt file {path}; give the path of one, or the name of a set") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"prompt file {path} cannot be read as UTF-8 text ({error}); save it as such") from error
    suffix = path.suffix.lower()
    if suffix == ".txt":
        body = text.strip()
        pieces = re.split(r"\n\s*\n", body) if re.search(r"\n\s*\n", body) else body.splitlines()
        return _from_list([piece.strip() for piece in pieces], path, name)
    if suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return _from_list([_parse(line, path, f", line {number}") for number, line in lines], path, name)
    value = _parse(text, path)
    return _from_object(value, path, name) if isinstance(value, dict) else _from_list(value, path, name)


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
    return PromptSet(name, tuple(train), tuple(test), source=str(path), licence="unknown")


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
    return PromptSet(name, sides["train"], sides["test"], source, licence, value.get("chat", False))


def _text(item: Any, path: Path, where: str) -> str:
    text = item.get("prompt") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise PromptFileError(
            f'prompt file {path}: {where} is {_kind(text)}; a prompt is a string, or an object with the string "prompt"'
        )
    return text


def _divide(prompts: list[str], name: str) -> tuple[list[str], list[str]]:
    """Train and test, in the order given; the hash of a prompt alone ranks it, so neighbours do not go together."""
    if len(prompts) < 2:
        raise PromptFileError(f"{name} has {len(prompts)} different prompts; at least 2 are needed to split off a test")
    ranked = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest())
    chosen = set(ranked[: max(1, round(len(prompts) * _TEST_SHARE))])
    return [prompt for prompt in prompts if prompt not in chosen], [prompt for prompt in prompts if prompt in chosen]


def _unique(prompts: list[str]) -> list[str]:
    return list({prompt.strip(): None for prompt in prompts if prompt.strip()})


def _kind(value: Any) -> str:
    return {"dict": "an object", "list": "a list", "str": "a string", "NoneType": "missing or null"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def _shorten(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


HUB_LIMIT = 512
_CHARACTERS = 2000  # of a document; the beginning of one is a prompt, the whole of it would fill any context


class DatasetError(SpecgymError, RuntimeError):
    """A hub dataset cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class HubSet:
    """Place of a dataset on the hub, and its column of text."""

    path: str
    config: str
    column: str
    train: str | None  # the dataset's own splits; None where it has but one
    test: str
    licence: str
    streamed: bool = False  # too large to download for a few hundred prompts


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
    texts = [row.get(spec.column) for row in taken]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DatasetError(
            f"the dataset {spec.path} has no text in a column {spec.column!r} of its split {split!r}: it has changed; "
            "save its texts to a .jsonl file and give that"
        )
    return [_beginning(text) for text in texts if text.strip()]


def _beginning(text: str) -> str:
    text = text.strip()
    if len(text) <= _CHARACTERS:
        return text
    head = text[:_CHARACTERS]
    return head.rsplit(maxsplit=1)[0] if any(character.isspace() for character in head) else head
