"""Readers of exports, run by an engine's interpreter: ``python engine_readers.py ENGINE SCRIPT [FILE]``.

Prints what the engine has read as a line of JSON, and fails where the engine refuses. Needs the standard library and
the engine alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def words_of(script: Path) -> list[str]:
    """Words of the one command in a script."""
    return shlex.split(script.read_text(), comments=True)


def llama_cpp(script: Path) -> dict[str, Any]:
    """Look for every option in the library of xllamacpp, and set the values where its parameters have them."""
    import xllamacpp

    words = words_of(script)
    library = b"".join(path.read_bytes() for path in Path(xllamacpp.__file__).parent.glob("*.so"))
    for word in words:
        if word.startswith("-") and b"\0" + word.encode() + b"\0" not in library:
            raise SystemExit(f"{word} is no option of xllamacpp {xllamacpp.__version__}")
    return dict(itertools.pairwise(words))


def vllm(script: Path) -> dict[str, Any]:
    """Parse the command line, and make the configuration of an engine of it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    _, _, target, *options = words_of(script)
    config = EngineArgs.from_cli_args(parser.parse_args(["--model", target, *options])).create_engine_config()
    drafting = config.speculative_config
    names = ("method", "num_speculative_tokens", "prompt_lookup_min", "draft_sample_method")
    return {name: getattr(drafting, name) for name in names}


def sglang(script: Path) -> dict[str, Any]:
    """Parse the command line by the server's own parser."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    read = vars(parser.parse_args(words_of(script)[3:]))
    drafted = read["speculative_num_draft_tokens"] - 1
    return {"speculative_num_draft_tokens - 1": drafted, "algorithm": read["speculative_algorithm"]}


def openvino(script: Path, file: Path) -> dict[str, Any]:
    """Read the file as a configuration, and check it."""
    import openvino_genai

    config = openvino_genai.GenerationConfig(str(file))
    config.max_new_tokens = 8
    config.validate()
    return {name: getattr(config, name) for name in json.loads(file.read_text())}


READERS: dict[str, Callable[..., dict[str, Any]]] = {
    "llama.cpp": llama_cpp,
    "vllm": vllm,
    "sglang": sglang,
    "openvino": openvino,
}


if __name__ == "__main__":
    engine, *names = sys.argv[1:]
    paths = [Path(name) for name in names]
    print("\n" + json.dumps(READERS[engine](*paths[: 2 if engine == "openvino" else 1])))
