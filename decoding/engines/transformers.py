"""transformers' own assisted generation and prompt lookup, in an interpreter of its own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..decoders.traits import EngineStop
from ..files import cache_folder, digest, file_name
from ..traits import Knob
from .engine import LOOKUP, EngineOptions
from .pipe import PipeEngine

_LONGEST = 64
"""Longest draft on offer, in tokens; transformers takes any."""


class Transformers(PipeEngine):
    """transformers, with its own loops of assisted generation and prompt lookup, in float32 on the CPU.

    Args:
        target: folder that `save_pretrained` wrote, hub id, or a model's name as `load_model` takes it. What only
            specgym reads is written to a plain folder in its cache once.
        draft: likewise, of the target's tokenizer; `LOOKUP` for prompt lookup; None for no draft.
        options: how the engine is run.

    Raises:
        ArgumentError: an address or a program is set. Loading errors as for `load_model`.
    """

    name = "transformers"
    package = "transformers 5.23.0"
    # ConfidenceCriteria ends a draft after a token that was drawn with less probability; so do end-of-text tokens.
    stop: ClassVar[EngineStop] = "transformers"
    module = "transformers_worker"
    installed_as = "transformers torch"

    def __init__(self, target: str, draft: str | None, options: EngineOptions | None = None) -> None:
        super().__init__(target, draft, options)
        # Defaults of GenerationConfig._get_default_generation_params and of PromptLookupCandidateGenerator in 5.23.0.
        if draft == LOOKUP:
            self.knobs = (
                Knob(
                    "prompt_lookup_num_tokens", 0, _LONGEST, 10, True, "tokens copied a round, at most", search=(0, 24)
                ),
                Knob("max_matching_ngram_size", 1, 16, 2, True, "longest n-gram looked up in the text", search=(1, 6)),
            )
        else:
            self.knobs = (
                Knob("num_assistant_tokens", 0, _LONGEST, 20, True, "tokens drafted a round, at most", search=(0, 24)),
                Knob("assistant_confidence_threshold", 0, 1, 0.4, doc="probability below which a token ends the draft"),
            )
            self.threshold_knob = self.knobs[1].name
        self.length_knob = self.knobs[0].name

    def models(self) -> Mapping[str, Any]:
        """Return the folders of the models, written now if need be, and the number of threads."""
        draft = None if self.draft in (None, LOOKUP) else plain_folder(str(self.draft))
        return {"target": plain_folder(self.target), "draft": draft, "threads": self.options.threads}


def plain_folder(name: str) -> str:
    """Return a folder that transformers reads without specgym, or a hub id.

    What only specgym reads is written once, in float32, to its cache: shipped models, other folders of its own format,
    GGUF files. A draft that scores some tokens only scores the others 0 there, which is low for a likely token.

    Args:
        name: of a model, as `load_model` takes it.

    Raises:
        ModelNotFoundError: and others, as `load_model`.
    """
    from ..loading.find_model import identity, load_model, shipped_models
    from ..loading.link import is_checkpoint
    from ..loading.presets import SMOLLM2, path_exists

    local = path_exists(name)
    ours = is_checkpoint(Path(name).expanduser()) or name.endswith(".gguf") if local else name in shipped_models()
    if local and not ours:
        return str(Path(name).expanduser().resolve())
    if not ours and name not in ("smollm2", SMOLLM2):
        return name
    kept = cache_folder() / "engines" / f"{file_name(Path(name).name)}-{digest(map(str, identity(name)))[:12]}"
    if kept.is_dir():
        return str(kept)
    model, tokenizer = load_model(name, device="cpu")
    _score_all(model)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=kept.parent) as scratch:
        unfinished = Path(scratch) / "model"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process may have written the same
            os.replace(unfinished, kept)
    return str(kept)


def _score_all(model: Any) -> None:
    """Replace an output layer that scores some tokens only by a whole one, which scores the others 0."""
    import torch
    from torch import nn

    from ..models.output_layer import ReducedOutput, output_module

    layer = output_module(model)
    if isinstance(layer, ReducedOutput):
        whole = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None)
        with torch.no_grad():
            for part in whole.parameters():
                part.zero_()
            whole.weight[layer.tokens] = layer.weight[layer.tokens]
            if layer.bias is not None:
                whole.bias[layer.tokens] = layer.bias[layer.tokens]
        model.set_output_embeddings(whole)
        model.config.tie_word_embeddings = False
