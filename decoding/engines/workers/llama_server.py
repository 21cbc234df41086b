"""llama.cpp's server out of the Python package xllamacpp, with the command line of llama-server.

``python llama_server.py --model FILE --port PORT ...`` serves until it is stopped; ``--version`` prints the package's
version. xllamacpp ships no llama-server program, but the same server as a class (xllamacpp 2026.10.11549, which is
llama.cpp b11549). Only the options are known that `llama_cpp.py` gives.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import threading
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Serve a model, or print the version."""
    try:
        import xllamacpp
    except ImportError as error:
        raise SystemExit(
            f"xllamacpp cannot be imported by {sys.executable} ({error}): {sys.executable} -m pip install xllamacpp"
        ) from None
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("xllamacpp"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", required=True)
    for name in ("port", "ctx-size", "parallel", "cache-ram"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--spec-draft-threads", type=int)
    parser.add_argument("--spec-type", choices=("draft-simple", "ngram-simple"))
    parser.add_argument("--spec-draft-model")
    for name in ("draft-n-max", "draft-n-min", "ngram-simple-size-n", "ngram-simple-size-m"):
        parser.add_argument(f"--spec-{name}", type=int)
    parser.add_argument("--spec-draft-p-min", type=float)
    server = xllamacpp.Server(_parameters(xllamacpp, parser.parse_args(arguments)))
    print(f"listening at {server.listening_address}", file=sys.stderr, flush=True)
    threading.Event().wait()


def _parameters(library: Any, options: argparse.Namespace) -> Any:
    parameters = library.CommonParams()
    parameters.model.path = options.model
    parameters.hostnames = [options.host]
    parameters.port = options.port
    parameters.n_ctx = options.ctx_size
    parameters.n_parallel = options.parallel
    parameters.cache_ram_mib = options.cache_ram
    parameters.endpoint_metrics = options.metrics
    speculative = parameters.speculative
    draft, lookup = speculative.draft, speculative.ngram_simple
    for holder, threads in ((parameters, options.threads), (draft, options.spec_draft_threads)):
        if threads is not None:
            holder.cpuparams.n_threads = holder.cpuparams_batch.n_threads = threads
    if options.spec_type is not None:
        kind = "COMMON_SPECULATIVE_TYPE_" + options.spec_type.replace("-", "_").upper()
        speculative.types = [getattr(library.common_speculative_type, kind)]
    if options.spec_draft_model is not None:
        draft.mparams.path = options.spec_draft_model
    for holder, name, value in (
        (draft, "n_max", options.spec_draft_n_max),
        (draft, "n_min", options.spec_draft_n_min),
        (draft, "p_min", options.spec_draft_p_min),
        (lookup, "size_n", options.spec_ngram_simple_size_n),
        (lookup, "size_m", options.spec_ngram_simple_size_m),
    ):
        if value is not None:
            setattr(holder, name, value)
    return parameters


if __name__ == "__main__":
    main(sys.argv[1:])
