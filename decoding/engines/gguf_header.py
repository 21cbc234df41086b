"""Reading a GGUF file's header: a model's metadata and vocabulary, without its weights. Free of torch.

Format: docs/gguf.md of ggml-org/ggml, versions 2 and 3. The `gguf` package's own reader takes 20 times as long, as it
makes an array of every token.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import ArgumentError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_NUMBERS: Final[Mapping[int, str]] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""`struct` letters of the types of values."""
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True)
class Value:
    """A value of the metadata with its types, as `gguf.GGUFValueType` numbers them; an array's second is its items'."""

    value: object
    types: tuple[int, ...]


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a GGUF file.

    Attributes:
        path: of the file.
        values: by name, such as ``general.architecture``.
    """

    path: Path
    values: Mapping[str, Value]

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as llama."""
        return str(self.get("general.architecture"))

    @property
    def tokens(self) -> list[str]:
        """Texts of the tokens in the vocabulary's own alphabet, by id; empty if there is no vocabulary."""
        tokens = self.get("tokenizer.ggml.tokens")
        return tokens if isinstance(tokens, list) else []

    def get(self, name: str) -> object:
        """Return a value; None if it is missing."""
        entry = self.values.get(name)
        return None if entry is None else entry.value


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        ArgumentError: there is no such file, it is none of this format, or it is cut off.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ArgumentError(f"{path} is no GGUF file")
            version, _, count = _numbers(file, "<IQQ")
            if version not in _VERSIONS:
                raise ArgumentError(f"{path} is a GGUF file of version {version}; {_VERSIONS} can be read")
            values = {}
            for _ in range(int(count)):
                name, (kind,) = _string(file), _numbers(file, "<I")
                values[name] = _value(file, int(kind))
    except (EOFError, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise ArgumentError(f"{path} is damaged or was cut off: copy or write it again") from error
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror}") from error
    return GgufHeader(path, values)


def _value(file: BinaryIO, kind: int) -> Value:
    if kind != _ARRAY:
        return Value(_reader(kind)(file), (kind,))
    items, count = map(int, _numbers(file, "<IQ"))
    if items in _NUMBERS:
        return Value(list(_numbers(file, f"<{count}{_NUMBERS[items]}")), (kind, items))
    read = _reader(items)
    return Value([read(file) for _ in range(count)], (kind, items))


def _reader(kind: int) -> Callable[[BinaryIO], object]:
    return _string if kind == _STRING else lambda file: _numbers(file, f"<{_NUMBERS[kind]}")[0]


def _numbers(file: BinaryIO, layout: str) -> tuple[float, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise EOFError
    return struct.unpack(layout, data)


def _string(file: BinaryIO) -> str:
    (length,) = map(int, _numbers(file, "<Q"))
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data.decode("utf-8", "surrogateescape")
