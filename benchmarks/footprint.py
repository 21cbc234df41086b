"""CPU seconds to the first token, and memory over the size of the weights, of ours and of transformers.

    python -m benchmarks.footprint                                # Linux
    python -m benchmarks.footprint --pairs tiny smollm2-4l --tokens 32 --repeats 1

Every measurement is a process of its own with one thread, in turns, and the figures are medians. *Imports* are those of
torch and of the classes of transformers that both need; *ours* has `import specgym` and a pair by its name, *assisted*
is transformers' own assisted generation with the same models, from folders in its own format. Seconds are of all that
the process did from its start on.

Memory is what was resident beyond what it was before anything was loaded, over the bytes of all weights, each counted
once: at the peak while loading, afterwards, and at the peak while decoding. Pages of files that are mapped count as
resident, though the system takes them back at need; a tokenizer counts, too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURE = "--measure"
"""First argument of the processes that are measured; what this file imports at its top is in their figures."""
PROMPT = "And it came to pass in those days, that there went out a decree"


@dataclass
class Settings:
    """Measure start and memory."""

    pairs: tuple[str, ...] = ("tiny", "smollm2-4l")
    """Pairs for `load_pair`, each with a draft that is a model."""
    tokens: int = 256
    """Tokens generated when memory is measured; from about 100 on, passes are captured."""
    repeats: int = 3
    """Processes of each way."""
    json: Path | None = None
    """File to write the figures to, too."""


def resident(name: str) -> int:
    """Resident memory of this process in bytes: `VmRSS` now, or `VmHWM` at its peak since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let the peak begin anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


Generate = Callable[[int], object]
"""Generates so many tokens."""


def load_ours(pair_name: str) -> Generate:
    """Load a pair of ours by its name."""
    from specgym.decoding import SpeculativeDecoder, load_pair

    pair = load_pair(pair_name)
    decoder, prompt = SpeculativeDecoder(pair), pair.encode(PROMPT)
    return lambda tokens: decoder.generate(prompt, max_new_tokens=tokens)


def load_theirs(folder: str) -> Generate:
    """Load the same models into transformers, from folders that `save_for_transformers` wrote."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    load: Any = AutoModelForCausalLM.from_pretrained
    target, draft = (load(f"{folder}/{part}", dtype=torch.float32) for part in ("target", "draft"))
    ids = AutoTokenizer.from_pretrained(f"{folder}/target")(PROMPT, return_tensors="pt")
    return lambda tokens: target.generate(
        **ids, assistant_model=draft, max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )


LOAD = {"ours": load_ours, "assisted": load_theirs}


def seconds(way: str, what: str) -> dict[str, float]:
    """CPU seconds of this process to its first token.

    Args:
        way: one of `LOAD`, or `imports` for what both need of others.
        what: name of the pair, or the folder of `load_theirs`.
    """
    if way == "imports":
        import_others()
        return {"imports": time.process_time()}
    figures = {}
    if way == "ours":
        import specgym  # noqa: F401

        figures["import specgym"] = time.process_time()
    LOAD[way](what)(1)
    return {**figures, "first token": time.process_time()}


def memory(way: str, what: str, tokens: int) -> dict[str, float]:
    """Bytes that loading models and generating so many tokens takes; arguments as for `seconds`."""
    import_others()
    if way == "ours":
        from specgym.decoding import SpeculativeDecoder, load_pair  # noqa: F401
    before = resident("VmRSS")
    forget_peak()
    generate = LOAD[way](what)
    figures = {"loading": resident("VmHWM") - before, "loaded": resident("VmRSS") - before}
    forget_peak()
    generate(tokens)
    return {**figures, "decoding": resident("VmHWM") - before}


def import_others() -> None:
    """Import torch and the classes of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)  # sets up what the first product does


def in_a_process(*arguments: str) -> dict[str, float]:
    """Figures of a process of its own.

    Raises:
        SystemExit: it failed; its last words are printed.
    """
    command = [sys.executable, "-m", "benchmarks.footprint", MEASURE, *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def save_for_transformers(pair_name: str, folder: Path) -> int:
    """Write a pair's models in transformers' own format and float16; return the bytes of all weights in float32."""
    import torch

    from specgym.decoding import ModelDrafter, load_pair

    pair = load_pair(pair_name, prepack=False, dtype=torch.float16, shared=False)
    if not isinstance(pair.draft, ModelDrafter):
        raise SystemExit(f"{pair_name} has no draft that is a model")
    assert pair.tokenizer is not None  # load_pair gives one
    pair.target.model.save_pretrained(folder / "target")
    pair.draft.model.model.save_pretrained(folder / "draft")
    pair.tokenizer.save_pretrained(folder / "target")
    models = (pair.target.model, pair.draft.model.model)
    return 4 * sum({id(weight): weight.numel() for model in models for weight in model.parameters()}.values())


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == [MEASURE]:
        way, what, tokens = sys.argv[2:]
        print(json.dumps(memory(way, what, int(tokens)) if int(tokens) else seconds(way, what)))
        return
    import tyro
    from rich.console import Console

    from benchmarks.compare_decoders import table_of
    from specgym.decoding import write_json

    settings = tyro.cli(Settings, prog="python -m benchmarks.footprint", description=__doc__)
    results: dict[str, dict[str, float]] = {}
    for pair in settings.pairs:
        with tempfile.TemporaryDirectory() as folder:
            weights = save_for_transformers(pair, Path(folder))
            runs: dict[str, list[dict[str, float]]] = {}
            for _ in range(settings.repeats):
                for way, what in (("imports", ""), ("ours", pair), ("assisted", folder)):
                    figures = in_a_process(way, what, "0")
                    if way in LOAD:
                        taken = in_a_process(way, what, str(settings.tokens))
                        figures |= {name: size / weights for name, size in taken.items()}
                    runs.setdefault(f"{pair}, {way}", []).append(figures)
        results |= {
            row: {name: statistics.median(run[name] for run in of_row) for name in of_row[0]}
            for row, of_row in runs.items()
        }
    headings = list(dict.fromkeys(name for figures in results.values() for name in figures))
    table = table_of("pair, way", *headings, title="CPU seconds; memory over the bytes of the weights")
    for row, figures in results.items():
        table.add_row(row, *(f"{figures[name]:.2f}" if name in figures else "-" for name in headings))
    Console(width=140).print(table)
    if settings.json:
        write_json(settings.json, {"results": results})


if __name__ == "__main__":
    main()
