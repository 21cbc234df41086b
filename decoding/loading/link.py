"""``specgym.json``, the description of a checkpoint folder: tokeniser, shared tensors, and its files' SHA-256."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import SpecgymError
from ..sealed_files import FILES, DamagedFileError, check_files, file_digests, read_sealed, write_sealed

LINK = "specgym.json"
FORMAT = "specgym-model-1"
"""Format of ``specgym.json``; earlier files have none, and no checksums."""
WEIGHTS, CONFIG, GENERATION = "model.safetensors", "config.json", "generation_config.json"
WAY_OUT = "reinstall specgym if the package ships this model, or write the folder anew with specgym.decoding.fit"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class CheckpointError(SpecgymError, RuntimeError):
    """A checkpoint folder cannot be used; the message names the file and the way out."""


@dataclass(frozen=True)
class Link:
    """Content of ``specgym.json``.

    Attributes:
        tokenizer: folder of the tokeniser, relative to the checkpoint's own, or hub id of a model that has it; None if
            it lies in the folder itself.
        shared_with: folder (relative to the checkpoint's own) or hub id of the model whose tensors it shares.
        shared: for each shared tensor's name here, its name there.
        files: SHA-256 of the files by their paths, relative to the folder; None in files of earlier versions.
    """

    tokenizer: str | None = None
    shared_with: str | None = None
    shared: Mapping[str, str] | None = None
    files: Mapping[str, str] | None = None


def is_checkpoint(folder: Path | str) -> bool:
    """True if a folder was written by :func:`save_checkpoint`."""
    return (Path(folder) / LINK).is_file()


def read_link(folder: Path | str) -> Link:
    """Read ``specgym.json``.

    Raises:
        CheckpointError: if it is missing, was changed, or is not what :func:`save_checkpoint` writes.
    """
    path = Path(folder) / LINK
    try:
        value = read_sealed(path, FORMAT)
        link = Link(value.get("tokenizer"), value.get("shared_with"), value.get("shared"), value.get(FILES))
        names = [link.tokenizer, link.shared_with]
        for table in (link.shared, link.files):
            if not (table is None or isinstance(table, dict)):
                raise ValueError(f"it holds {table!r} where an object was expected")
            names += [] if table is None else [*table, *table.values()]
        if unfit := [name for name in names if name is not None and not _is_name(name)]:
            raise ValueError(f"{unfit[0]!r} is no name")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {WAY_OUT}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {WAY_OUT}") from error
    if (link.shared_with is None) != (not link.shared):
        raise CheckpointError(f"{path} must name both or neither of 'shared_with' and 'shared': {WAY_OUT}")
    return link


def lender(folder: Path | str, name: str | None) -> str | None:
    """The hub id of a model that a checkpoint borrows from; None for nothing, or a folder relative to its own.

    Args:
        folder: the checkpoint's own.
        name: `Link.tokenizer` or `Link.shared_with`.
    """
    return None if name is None or name.startswith(".") or (Path(folder) / name).is_dir() else name


def tokenizer_folder(folder: Path | str) -> Path:
    """The folder that ``AutoTokenizer.from_pretrained`` reads for this checkpoint, if no hub id stands in its link.

    Raises:
        CheckpointError: if ``specgym.json`` is bad or names no folder that exists.
    """
    folder = Path(folder)
    link = read_link(folder)
    holder = folder if link.tokenizer is None else (folder / link.tokenizer).resolve()
    if not any((holder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{holder} holds no tokeniser, but {folder / LINK} points there: {WAY_OUT}")
    check_digests(folder, link, (name for name in link.files or () if name.endswith(_TOKENIZER_FILES)))
    return holder


def write_link(folder: Path, link: Link) -> None:
    """Write ``specgym.json`` with the digests of the files that are there.

    Those of a tokeniser in another folder are among them. One in the folder itself is its owner's to change: somebody
    may want another chat template.
    """
    borrowed = [] if link.tokenizer is None else [f"{link.tokenizer}/{name}" for name in _TOKENIZER_FILES]
    names = [WEIGHTS, CONFIG, GENERATION, *borrowed]
    digests = file_digests(folder, [name for name in names if (folder / name).is_file()])
    about = {"tokenizer": link.tokenizer, "shared_with": link.shared_with, "shared": link.shared}
    write_sealed(folder / LINK, {"format": FORMAT, **about, FILES: digests})


def check_digests(folder: Path, link: Link, names: Iterable[str]) -> None:
    """Check files of a folder against the digests in its ``specgym.json``; earlier ones have none.

    Raises:
        CheckpointError: a file is missing or has changed.
    """
    try:
        check_files(folder, {FILES: link.files}, *names)
    except DamagedFileError as error:
        raise CheckpointError(f"{error}: {WAY_OUT}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing: {WAY_OUT}") from error
    except OSError as error:
        raise CheckpointError(f"a file of {folder} cannot be read ({error}): {WAY_OUT}") from error


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and 0 < len(name) < 256
