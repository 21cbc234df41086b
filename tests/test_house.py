"""Rules of the house: sizes, names, first lines of docstrings, doors between the floors, and packaging.

``python -m tests.test_house`` lists every offender; ``python -m tests.test_house decoding/fit envs`` those of some
folders or files. CONTRIBUTING.md explains the rules.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("decoding", "envs", "agents", "callbacks")
MAY_IMPORT = {
    "decoding": set[str](),
    "envs": {"decoding"},
    "callbacks": {"decoding", "envs"},
    "agents": {"decoding", "envs", "callbacks"},
}
"""Floors that each floor may import, all from their doors."""
MOST_PACKAGE_FILES = 318
MOST_ROOMS = 17
MOST_FILES_IN_A_FOLDER = 12
MOST_LINES = 400
FEWEST_LINES = 80
DECODER_WORDS = re.compile(r"medusa|lookahead|draft.?tree|fallback|rollback", re.IGNORECASE)
"""Decoders and their knobs, which the code above them must not name."""
EARLIER_FORMATS = ("agents/training/settings_io.py",)
"""Readers of earlier file formats, which do."""
ENTRY_POINTS = ("specgym/moved.py", "agents/training/preloading.py")
"""Short files that are files for what importing them does."""
STAND_ALONE = "decoding/engines/workers/"
"""Programs that are files because they run by themselves, short ones too."""
FIRST_WORDS = re.compile(r"(What|Of|The same|As|How|Whether|Where|When|From)\b")
BANNED_NAMES = frozenset({"found", "made", "told", "given", "one", "each", "own", "dice", "cycle", "wanted"})


class Offender(NamedTuple):
    """One breach of a rule."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Source(NamedTuple):
    """A Python file and the nodes of its syntax tree."""

    path: str
    text: str
    nodes: tuple[ast.AST, ...]

    @property
    def folder(self) -> str:
        """Folder of the file, from the root."""
        return self.path.rpartition("/")[0]

    @property
    def module(self) -> str:
        """Dotted name of the module."""
        parts = self.path.rsplit(".", 1)[0].split("/")
        if parts[-1] == "__init__":
            parts.pop()
        return ".".join(["specgym", *parts] if parts[0] in FLOORS else parts)


@functools.cache
def sources() -> tuple[Source, ...]:
    """Every Python file of the repository, stubs included, that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py", "*.pyi"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = sorted({path for path in listed if path and (ROOT / path).is_file()})
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    return tuple(Source(path, text, tuple(ast.walk(ast.parse(text, path)))) for path, text in texts.items())


def package_sources() -> list[Source]:
    """Python files of the four floors and of `specgym`, without stubs."""
    return [file for file in sources() if in_package(file) and file.path.endswith(".py")]


def in_package(file: Source) -> bool:
    """True for what the wheel contains."""
    return file.path.split("/")[0] in (*FLOORS, "specgym")


def docstrings(file: Source) -> Iterator[tuple[ast.AST, ast.Constant]]:
    """Docstrings of the module, its classes, functions and attributes, each with what it documents."""
    for node in file.nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for before, statement in zip([node, *node.body], node.body, strict=False):
                match statement:
                    case ast.Expr(value=ast.Constant(value=str()) as text):
                        yield before, text
                    case _:
                        pass


def package_files() -> Iterator[Offender]:
    """Package files beyond the number allowed."""
    files = [file.path for file in package_sources()]
    for path in files[MOST_PACKAGE_FILES:]:
        yield Offender("package", 0, f"{len(files)} package files; {path} is beyond {MOST_PACKAGE_FILES}")


def rooms() -> Iterator[Offender]:
    """Rooms at the top of `decoding` beyond the number allowed: files and folders, the data and its door left out."""
    inside = {
        file.path.split("/")[1]
        for file in package_sources()
        if file.path.startswith("decoding/") and file.path != "decoding/__init__.py"
    }
    for room in sorted(inside)[MOST_ROOMS:]:
        yield Offender(f"decoding/{room}", 0, f"{len(inside)} rooms in decoding/, at most {MOST_ROOMS}")


def folder_sizes() -> Iterator[Offender]:
    """Files of the package beyond the number that a folder may have."""
    by_folder = defaultdict(list)
    for file in package_sources():
        by_folder[file.folder].append(file.path)
    for folder, paths in by_folder.items():
        for path in paths[MOST_FILES_IN_A_FOLDER:]:
            yield Offender(path, 0, f"{len(paths)} files in {folder}/, at most {MOST_FILES_IN_A_FOLDER}")


def file_lengths() -> Iterator[Offender]:
    """Files of too many lines."""
    for file in sources():
        lines = len(file.text.splitlines())
        if lines > MOST_LINES:
            yield Offender(file.path, lines, f"{lines} lines, at most {MOST_LINES}; a file is one idea")


def decoder_words() -> Iterator[Offender]:
    """Names and strings of envs/ and agents/ that name a decoder or one of its knobs; docstrings may."""
    for file in sources():
        if not file.path.startswith(("envs/", "agents/")) or file.path in EARLIER_FORMATS:
            continue
        documentation = {id(value) for _, value in docstrings(file)}
        for node in file.nodes:
            if id(node) in documentation:
                continue
            for word in words_of(node):
                if DECODER_WORDS.search(word):
                    shown = word if len(word) < 60 else f"{word[:57]}..."
                    yield Offender(file.path, getattr(node, "lineno", 1), f"names a decoder or its knob: {shown!r}")


def words_of(node: ast.AST) -> Iterator[str]:
    """Names and strings of a node itself, not of its children."""
    for field in ("id", "attr", "arg", "name", "asname", "module", "rest", "kwd_attrs"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def first_lines() -> Iterator[Offender]:
    """Docstrings whose first line is no noun phrase and no imperative."""
    for file in sources():
        for documented, value in docstrings(file):
            first = str(value.value).strip().partition("\n")[0]
            if FIRST_WORDS.match(first):
                yield Offender(file.path, value.lineno, f"{label(documented)}: {first!r}")


def label(node: ast.AST) -> str:
    """Name of what a docstring documents."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return str(getattr(node, "name", "module"))


def names() -> Iterator[Offender]:
    """Variables, arguments, functions and attributes with a name that says nothing."""
    for file in sources():
        for node in file.nodes:
            for name in bound_names(node):
                if name in BANNED_NAMES:
                    yield Offender(file.path, getattr(node, "lineno", 1), f"{name!r} is no name for a thing")


def bound_names(node: ast.AST) -> Iterator[str]:
    """Names that a node binds."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.alias(asname=str(name)):
            yield name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name
        case _:
            pass


def imports(file: Source) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name of every import; relative ones resolved, the name None for ``import module``."""
    package = file.module.split(".")
    if not re.search(r"__init__\.pyi?$", file.path):
        package.pop()
    for node in file.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, module, alias.name


def doors() -> Iterator[Offender]:
    """Imports that pass by another floor's door, and imports upwards; tests and recipes work on the inside."""
    modules = {file.module for file in sources()}
    for file in sources():
        top = file.path.split("/")[0]
        if top in ("tests", "recipes") or (top == "specgym" and file.path != "specgym/__init__.py"):
            continue
        for line, module, name in imports(file):
            target = f"{module}.{name}" if name and f"{module}.{name}" in modules else module
            parts = target.split(".")
            if parts[0] != "specgym" or len(parts) < 2 or parts[1] not in FLOORS or parts[1] == top:
                continue
            if top in FLOORS and parts[1] not in MAY_IMPORT[top]:
                yield Offender(file.path, line, f"{top} must not import {parts[1]}")
            elif len(parts) > 2:
                yield Offender(file.path, line, f"import from the door, specgym.{parts[1]}, and not from {target}")


def lone_files() -> Iterator[Offender]:
    """Short package files with a single importer, of which they should be a part."""
    importing = [file for file in sources() if not file.path.startswith("tests/")]
    modules = {file.module for file in importing}
    exported = door_names()
    importers: dict[str, set[str]] = defaultdict(set)
    for file in importing:
        for _, module, name in imports(file):
            target = f"{module}.{name}"
            importers[target if target in modules else exported.get(target, module)].add(file.path)
        for node in file.nodes:  # modules that are named in strings, such as entry points
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                importers[node.value.partition(":")[0]].add(file.path)
    for file in package_sources():
        lines = len(file.text.splitlines())
        alone = file.path.endswith(("__init__.py", "__main__.py", *ENTRY_POINTS)) or file.folder + "/" == STAND_ALONE
        if lines < FEWEST_LINES and not alone:
            using = importers[file.module] - {file.path}
            if len(using) <= 1:
                importer = next(iter(using), "no file")
                yield Offender(file.path, lines, f"{lines} lines, imported by {importer} alone: merge them")


def door_names() -> dict[str, str]:
    """Modules by the names under which the doors of the floors and rooms export what is in them."""
    exported = {}
    for file in sources():
        if in_package(file) and re.search(r"__init__\.pyi?$", file.path):
            for _, module, name in imports(file):
                if module.startswith(f"{file.module}."):
                    exported[f"{file.module}.{name}"] = module
    return exported


def packaging() -> Iterator[Offender]:
    """Folders of the package without ``__init__.py``, which the wheel would lack."""
    for folder in sorted({file.folder for file in package_sources()}):
        if not (ROOT / folder / "__init__.py").is_file():
            yield Offender(folder, 0, "no __init__.py")


RULES: dict[str, Callable[[], Iterable[Offender]]] = {
    "package files": package_files,
    "rooms": rooms,
    "folder sizes": folder_sizes,
    "file lengths": file_lengths,
    "lone files": lone_files,
    "decoder words": decoder_words,
    "first lines": first_lines,
    "names": names,
    "doors": doors,
    "packaging": packaging,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rules(rule: str) -> None:
    listed = "\n".join(map(str, RULES[rule]()))
    assert not listed, f"{rule}: {(RULES[rule].__doc__ or '').strip()}\n{listed}"


def main(arguments: list[str]) -> int:
    """Print the offenders in some folders or files, by default in all; return 1 if there are any."""
    folders = tuple(argument.rstrip("/") for argument in arguments)
    total = 0
    for rule, find in RULES.items():
        offenders = [
            offender
            for offender in find()
            if not folders
            or any(offender.path == folder or offender.path.startswith(f"{folder}/") for folder in folders)
        ]
        total += len(offenders)
        if offenders:
            print(f"{rule}: {len(offenders)}", *offenders, sep="\n  ")
    print(f"{total} offenders")
    return min(total, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
