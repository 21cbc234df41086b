"""Files whose content is checked: a SHA-256 in what this package writes, and bounds on what it reads.

What this package writes carries a checksum of its content under the name ``sha256``: a key of a JSON object, a member
of an archive of arrays, an entry of a safetensors file's metadata. Files that other programs read, such as a model's
weights, are listed with their own SHA-256 under ``files`` in the JSON object that describes their folder. Readers check
both. Files of earlier versions have neither and are read without. A checksum tells damage, not who wrote a file.

Archives of arrays are ``.npz`` files, read without ever allocating more than they can hold: every declared shape and
size is compared with the file first. Only plain numbers and text are read; nothing is unpickled, and no header is
evaluated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from .errors import SpecgymError
from .files import replacing, write_json

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "sha256"
FILES = "files"
Arrays = Mapping[str, NDArray[Any]]
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
_ALWAYS_READ = 256 << 20
_LARGEST_RATIO = 200
"""Bytes unpacked for each byte of the file, beyond which a file of more than `_ALWAYS_READ` is refused. Recordings have
up to 20; deflate reaches 1032, with nothing but zeros."""
# Major and minor version, then the length of the header: numpy/lib/_format_impl.py of NumPy 2.
_MAGIC = re.compile(rb"\x93NUMPY(?:\x01\x00(?P<short>..)|\x02\x00(?P<long>....))", re.DOTALL)
_HEADER = re.compile(
    r"\{'descr': '([<>|][biufU]\d{1,9})', 'fortran_order': (False|True), 'shape': \(((?:\d{1,18},? ?)*)\), \} *\n"
)
_LONGEST_HEADER = 10_000


class DamagedFileError(SpecgymError, ValueError):
    """A file that is cut short, malformed, or not as it was written; the message says how, its reader which file."""


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        DamagedFileError: the file holds none.
        OSError: it is missing or cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # json follows nested lists by recursion
        raise DamagedFileError(f"it holds no JSON: {error}") from error


def write_sealed(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of its content, atomically.

    Args:
        path: the file.
        content: what JSON takes; its `format` names what it is, and the version.
    """
    plain = json.loads(json.dumps(content))
    write_json(Path(path), {**plain, CHECKSUM: _content_digest(plain)})


def read_sealed(path: str | Path, *current: str) -> dict[str, Any]:
    """Read a JSON object, and check its content against its checksum, if it has one.

    Args:
        path: the file.
        current: values of `format` that are always written with a checksum. An object of another format may be of an
            earlier version, and may lack one.

    Returns:
        The object without the checksum.

    Raises:
        DamagedFileError: the file holds no JSON object, or another content than was written.
        OSError: it is missing or cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedFileError(f"it holds a {type(content).__name__} where an object was expected")
    return unsealed(content, *current)


def unsealed(content: Mapping[str, Any], *current: str) -> dict[str, Any]:
    """Check the content of a JSON object against its checksum, and return it without; as `read_sealed`."""
    plain = {name: value for name, value in content.items() if name != CHECKSUM}
    if CHECKSUM in content or plain.get("format") in current:
        check_digest(content.get(CHECKSUM), _content_digest(plain))
    return plain


def check_digest(stored: object, actual: str) -> None:
    """Raise DamagedFileError unless a stored checksum is that of what was read."""
    if stored is None:
        raise DamagedFileError("its checksum is missing, so it was cut or changed after it was written")
    if stored != actual:
        raise DamagedFileError("its content does not match its checksum, so it was changed after it was written")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of some files of a folder, by name: what a description keeps under `files`."""
    return {name: file_digest(folder / name) for name in names}


def check_files(folder: Path, description: Mapping[str, Any], *names: str) -> None:
    """Check files against the digests in the description of their folder; one of an earlier version has none.

    Args:
        folder: of the files.
        description: what `read_sealed` returned.
        names: files to check; by default all that are listed.

    Raises:
        DamagedFileError: a file has changed, or is not listed; the message names it.
        OSError: a file is missing or cannot be read.
    """
    digests = description.get(FILES)
    if digests is None:
        return
    if not isinstance(digests, dict):
        raise DamagedFileError(f"its {FILES!r} is no object")
    for name in names or digests:
        try:
            check_digest(digests.get(name), file_digest(folder / name))
        except DamagedFileError as error:
            raise DamagedFileError(f"{folder / name} is damaged: {error}") from None


def require_shapes(declared: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Check tensors of a file against those that its description declares, before memory is set aside for them.

    Args:
        declared: tensors by name, such as a module's on the device "meta".
        stored: tensors or arrays by name.

    Raises:
        DamagedFileError: one is missing, too many, or of another shape; the message names it.
    """
    for name in sorted({*declared, *stored}):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (declared, stored)]
        if shapes[0] != shapes[1]:
            raise DamagedFileError(f"{name} should have shape {shapes[0]}, and has {shapes[1]}")


def _content_digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class ArrayFile(NamedTuple):
    """Content of an archive."""

    arrays: dict[str, NDArray[Any]]
    sealed: bool
    """True if a checksum is there, with which the arrays agree; files of earlier versions have none."""


def write_arrays(path: str | Path, arrays: Arrays, *, compressed: bool = True) -> None:
    """Write arrays with a checksum of their content; a reader never sees half of them.

    Args:
        path: the file, ending in ``.npz``.
        arrays: by name; numbers, truth values or text.
        compressed: deflate them.
    """
    stored = {name: np.asarray(array) for name, array in arrays.items()}
    seal = np.array(arrays_digest(stored))
    write: Any = np.savez_compressed if compressed else np.savez
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        write(file, allow_pickle=False, **stored, **{CHECKSUM: seal})


def read_arrays(path: str | Path, only: Collection[str] | None = None) -> ArrayFile:
    """Read what `write_arrays` or `numpy.savez` wrote.

    Args:
        path: the file.
        only: names of the arrays to read, those that are there; the checksum is then not looked at.

    Raises:
        DamagedFileError: it is no archive, damaged, holds something else than plain arrays, declares more than it has,
            or does not match its checksum.
        FileNotFoundError: it is missing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, os.path.getsize(path))
            arrays = {
                name: _read_member(archive, member)
                for member in members
                if (name := member.filename.removesuffix(".npy")) in (only or (name,))
            }
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise DamagedFileError(f"it is no archive of arrays, or damaged: {error}") from error
    stored = arrays.pop(CHECKSUM, None)
    if stored is not None:
        check_digest(str(stored), arrays_digest(arrays))
    return ArrayFile(arrays, stored is not None)


def arrays_digest(arrays: Arrays, facts: str = "") -> str:
    """SHA-256 over names, types, shapes and values of arrays, and over a text that belongs to them; 64 hex digits."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name} {array.dtype.str} {arrays[name].shape} ".encode())
        state.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    state.update(facts.encode("utf-8"))
    return state.hexdigest()


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    names = [member.filename for member in members]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DamagedFileError(f"it has {min(repeated)!r} twice")
    for member in members:
        if not member.filename.endswith(".npy") or member.flag_bits & 1:
            raise DamagedFileError(f"{member.filename!r} is no array")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedFileError(f"{member.filename!r} is packed in a way that this package never uses")
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(_ALWAYS_READ, _LARGEST_RATIO * size):
        raise DamagedFileError(f"its {size} bytes would unpack to {unpacked}, which no recording does")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as stream:
        kind, shape, fortran, begin = _read_header(cast(BinaryIO, stream), name)
        count = math.prod(shape)
        if begin + count * kind.itemsize != member.file_size:
            raise DamagedFileError(
                f"{name!r} is declared as {kind.str} of shape {shape}, which {member.file_size} bytes are not"
            )
        # From a bytearray, the array can be written to.
        values = np.frombuffer(bytearray(stream.read()), kind, count)
    return values.reshape(shape, order="F" if fortran else "C")


def _read_header(stream: BinaryIO, name: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Type, shape, whether columns come first, and the place of the first value."""
    begin = stream.read(8)
    begin += stream.read(2 if begin.endswith(b"\x01\x00") else 4)
    magic = _MAGIC.fullmatch(begin)
    length = int.from_bytes(magic["short"] or magic["long"], "little") if magic else 0
    if not 0 < length <= _LONGEST_HEADER:
        raise DamagedFileError(f"{name!r} is no array")
    header = _HEADER.fullmatch(stream.read(length).decode("latin-1"))
    if header is None:
        raise DamagedFileError(f"{name!r} holds something else than numbers, truth values or text")
    try:
        kind = np.dtype(header[1])
    except TypeError:
        raise DamagedFileError(f"{name!r} has a type that is none, {header[1]!r}") from None
    if not kind.itemsize:
        raise DamagedFileError(f"{name!r} has values of no size")
    return kind, tuple(map(int, header[3].replace(",", " ").split())), header[2] == "True", len(begin) + length


def read_tensors(path: Path, error: type[SpecgymError]) -> dict[str, Tensor]:
    """Tensors by name from a file of others, ``.safetensors`` or torch's own, of which nothing that would run is read.

    Args:
        path: of the file.
        error: what to raise.

    Raises:
        SpecgymError: of the type given; the file is damaged or holds something else.
    """
    import torch  # which takes seconds, and recordings are read without
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError("it holds something else than tensors by name")
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as problem:
        raise error(f"{path} is damaged ({' '.join(str(problem).split())}); fetch it again") from problem
    return tensors
