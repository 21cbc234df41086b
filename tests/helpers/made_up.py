"""Made-up descriptions of traces."""

from __future__ import annotations

from typing import Any

from specgym.envs.recordings.trace import TraceInfo


def trace_info(**known: Any) -> TraceInfo:
    """Description of a greedy pair over 50 tokens; `known` are fields with other values."""
    names = dict.fromkeys(("target_sha256", "draft_sha256", "prompts_sha256", "specgym", "torch", "transformers"), "0")
    numbers = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "vocabulary_size": 50, "detour_tokens": 0, "seed": 0}
    return TraceInfo(**{"target": "target", "draft": "draft", "split": "train", **names, **numbers, **known})
