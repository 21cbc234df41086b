"""Made-up descriptions of traces."""

from __future__ import annotations

from typing import Any

from specgym.decoding import load_prompts, shipped_prompts
from specgym.envs.recordings.trace import TraceInfo


def trace_info(**known: Any) -> TraceInfo:
    """Description of a greedy pair over 50 tokens; `known` are fields with other values."""
    names = dict.fromkeys(("target_sha256", "draft_sha256", "prompts_sha256", "specgym", "torch", "transformers"), "0")
    numbers = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "vocabulary_size": 50, "detour_tokens": 0, "seed": 0}
    prompts = known["workload"].partition("@")[0].rpartition("/")[2]
    if prompts in shipped_prompts():
        names["prompts_sha256"] = load_prompts(prompts).digest
    return TraceInfo(**{"target": "target", "draft": "draft", "split": "train", **names, **numbers, **known})
