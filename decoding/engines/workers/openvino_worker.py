"""A worker that decodes with OpenVINO GenAI: plainly, with a draft model, or by prompt lookup; and makes IR of GGUF."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

_DEVICE = "CPU"
# Activations quantised on the fly, and keys and values in 8 bits, are the CPU plugin's defaults (OpenVINO 2026.4.1).
_FLOAT32 = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "KV_CACHE_PRECISION": "f32",
}


class Worker:
    """Pipelines of a target, and texts of them. Its methods answer requests of `loop.py`."""

    def load(
        self, target: str, draft: str | None, lookup: bool, threads: int | None, float32: bool, kept: str
    ) -> dict[str, Any]:
        """Find the models, and make IR of those that are GGUF files.

        Args:
            target: folder with IR and tokenizer, or GGUF file.
            draft: likewise; None for none.
            lookup: whether there is prompt lookup.
            threads: of inference; None for the plugin's default.
            float32: compute in float32, with nothing quantised on the fly.
            kept: folder for IR that is made of GGUF, by the file's name, size and time.

        Returns:
            The version of openvino-genai, or why a model is refused.
        """
        self._properties = dict(_FLOAT32) if float32 else {}
        if threads is not None:
            self._properties["INFERENCE_NUM_THREADS"] = threads
        self._lookup = lookup
        folders: dict[str, Path] = {}
        for model in (target, draft):
            if model is not None:
                try:
                    folders[model] = _ir(model, Path(kept))
                except RuntimeError as error:
                    reason = str(error).strip().splitlines()[-1]
                    return {
                        "refused": f"no IR can be made of {model} ({reason}). It takes Llama and Qwen models whose "
                        "matrices are of type F16, Q8_0, Q6_K, Q4_K, Q4_1 or Q4_0"
                    }
        self._target = folders[target]
        self._draft = None if draft is None else folders[draft]
        self._pipelines: dict[bool, Any] = {}
        self._tokenizer = openvino_genai.Tokenizer(str(self._target))
        # The pipeline itself compares how many tokens one sentence has (are_tokenizers_equal in openvino.genai,
        # src/cpp/src/speculative_decoding/continuous_batching/fast_draft_strategy.cpp).
        if self._draft and openvino_genai.Tokenizer(str(self._draft)).get_vocab() != self._tokenizer.get_vocab():
            return {"refused": f"the draft {draft} has other tokens than the target; give one of the target's family"}
        self._pipeline(False)
        return {"version": openvino_genai.get_version()}

    def _pipeline(self, drafting: bool) -> Any:
        """The pipeline that decodes plainly or with drafts, made when it is first needed."""
        if drafting not in self._pipelines:
            extra: dict[str, Any] = {}
            if drafting and self._lookup:
                extra = {"prompt_lookup": True}
            elif drafting:
                extra = {"draft_model": openvino_genai.draft_model(str(self._draft), _DEVICE, **self._properties)}
            self._pipelines[drafting] = openvino_genai.LLMPipeline(
                str(self._target), _DEVICE, **self._properties, **extra
            )
        return self._pipelines[drafting]

    def chat_prompt(self, message: str) -> list[int] | None:
        """Return the token ids of a user's message in the chat template; None where the tokenizer has none."""
        if not self._tokenizer.chat_template:
            return None
        text = self._tokenizer.apply_chat_template([{"role": "user", "content": message}], True)
        ids = self._tokenizer.encode(text, add_special_tokens=False).input_ids
        return [int(token) for token in np.array(ids.data).ravel()]

    def generate(
        self,
        prompt: str | list[int],
        settings: dict[str, int] | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> dict[str, Any]:
        """Generate a text.

        Args:
            prompt: a string, or token ids.
            settings: fields of a `GenerationConfig`; None for plain decoding.
            max_new_tokens: at most.
            temperature: 0 for greedy decoding.
            seed: of sampling.

        Returns:
            The fields of `EngineText`.
        """
        pipeline = self._pipeline(settings is not None)
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt).input_ids
        else:
            ids = openvino.Tensor(np.array([prompt], np.int64))
        if not ids.get_size():
            return {"refused": "the prompt has no tokens"}
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.do_sample = temperature > 0
        if temperature:
            config.temperature, config.rng_seed = temperature, seed
        for name, value in (settings or {}).items():
            setattr(config, name, value)
        try:
            output = pipeline.generate(ids, config)
        except RuntimeError as error:
            # The pipeline would decode all other texts without its draft, and say nothing (openvino-genai 2026.4.1).
            del self._pipelines[settings is not None]
            if settings and temperature and self._draft:
                raise RuntimeError(
                    f"{str(error).strip()}; many texts that are sampled with a draft fail so (openvino-genai "
                    "2026.4.1): decode greedily, with prompt lookup, or without a draft"
                ) from None
            raise
        tokens = [int(token) for token in output.tokens[0]]
        return {
            "text": self._tokenizer.decode(tokens),
            "tokens": tokens,
            "new_tokens": len(tokens),
            **_measured(output, settings is not None),
        }


def _measured(output: Any, drafting: bool) -> dict[str, Any]:
    """Fields of `EngineText` about time and counts.

    The counters of a pipeline with a draft leave out the last round of a text, whose request has ended by the time
    they are written (openvino.genai, src/cpp/src/speculative_decoding/continuous_batching/fast_draft_strategy.cpp).
    """
    raw = output.perf_metrics.raw_metrics
    # Milliseconds, and tokens, at the end of the prompt and of every round.
    times, sizes = list(raw.m_new_token_times), [int(size) for size in raw.m_batch_sizes]
    fields: dict[str, Any] = {
        "seconds": (times[-1] - times[0]) / 1000,
        "prompt_seconds": output.perf_metrics.get_ttft().mean / 1000,
        "first_tokens": sizes[0],
    }
    if not drafting:
        return fields
    counted = output.extended_perf_metrics
    rounds = len(sizes) - 1
    if counted is None:  # prompt lookup tells no more than how many tokens came each time
        return {**fields, "rounds": rounds, "accepted": sum(sizes[1:]) - rounds}
    by_round = [size - 1 for size in sizes[1:-1]]
    return {
        **fields,
        "rounds": rounds,
        "drafted": counted.get_num_draft_tokens(),
        "accepted": counted.get_num_accepted_tokens(),
        "accepted_by_place": [sum(size > place for size in by_round) for place in range(max(by_round, default=0))],
    }


def _ir(model: str, kept: Path) -> Path:
    """The folder of a model's IR, which is made of a GGUF file once; openvino-genai writes it beside the file."""
    if not model.endswith(".gguf"):
        return Path(model)
    file = Path(model).resolve()
    facts = file.stat()
    folder = kept / f"{file.stem}-{facts.st_size}-{facts.st_mtime_ns}"
    if not folder.is_dir():
        unfinished = kept / f".{folder.name}-{os.getpid()}"
        unfinished.mkdir(parents=True)
        try:
            link = unfinished / file.name
            link.symlink_to(file)
            openvino_genai.LLMPipeline(str(link), _DEVICE, enable_save_ov_model=True)
            link.unlink()
            if not folder.is_dir():  # another process may have made the same
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
