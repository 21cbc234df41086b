from .decoder import Decoder, Session
from .decoders.autoregressive import AutoregressiveDecoder, Side, decode_in_turns
from .decoders.batch import Batch, TextRequest, generate_texts
from .decoders.beams.decoder import BeamSearchDecoder
from .decoders.chain import SpeculativeDecoder, require_choice
from .decoders.chain_session import SpeculativeSession
from .decoders.choice_features import CHOICE_FEATURES, MOST_DRAFTS, SLOT_FEATURES, ChoiceTracker
from .decoders.choice_rules import ChoiceRule, ExpectedGainChoice, FurtherCosts, best_choice, of_drafts, places_of
from .decoders.draft_tree.decoder import DraftTreeDecoder, DraftTreeRound
from .decoders.draft_tree.files import usual_acceptance, usual_alignment
from .decoders.draft_tree.pruning import RULES
from .decoders.expected_gain import BINS, LEVELS, ExpectedGain, KeepChances, bins_of, levels_of
from .decoders.knob_rules import FollowAcceptance, KnobRule, RoundTracker, round_features
from .decoders.lookahead.decoder import JacobiDecoder, LookaheadDecoder
from .decoders.lookahead.parallel import ParallelError, torchrun_group
from .decoders.lookahead.pool import PoolSettings, Retention
from .decoders.lookahead.traits import LookaheadRound, LookaheadStatistics, Preset
from .decoders.medusa.decoder import MedusaDecoder, TypicalMedusaDecoder
from .decoders.medusa.files import heads_for, load_heads
from .decoders.medusa.heads import MedusaHeads
from .decoders.medusa.traits import DELTA, EPSILON
from .decoders.pipelined.decoder import PipelinedDecoder, PipelinedThresholdDecoder
from .decoders.stop_rules import (
    FEATURES,
    ConfidenceBelow,
    DraftTracker,
    EntropyAbove,
    Feature,
    FixedLength,
    ProductBelow,
    Rows,
    StopRule,
    TokenRule,
)
from .decoders.threshold import ThresholdDecoder
from .decoders.traits import ENGINE_SETTINGS, EngineSettings, EngineStop
from .drafts.cascade import CascadeDrafter
from .drafts.copying import PromptLookupDrafter, SuffixDrafter
from .drafts.drafter import (
    Drafter,
    DraftSession,
    DraftStep,
    ModelDrafter,
    ModelStep,
    OneHotStep,
    Proposal,
    beside,
    draft_digest,
    is_free,
)
from .drafts.eagle.drafter import EagleDrafter
from .drafts.eagle.files import load_head, save_head
from .drafts.eagle.head import EagleHead
from .drafts.eagle.layer import EagleHeadError
from .drafts.mixed import MixedDraft, draft_models, drafts_of
from .drafts.ngram import NGramDrafter
from .drafts.translated import TranslatedModel
from .engines.engine import (
    LOOKUP,
    Engine,
    EngineError,
    EngineOptions,
    EngineText,
    Served,
    SettingIgnoredError,
    engine_names,
    open_engine,
)
from .engines.export.setting import Export, ServedSetting
from .engines.export.writers import EXPORT_ENGINES, engine_arguments, export_setting, setting_of_pair, takes_threshold
from .engines.gguf import GgufSettings, write_gguf
from .errors import (
    LARGEST_SEED,
    LARGEST_WHOLE,
    MOST_THREADS,
    ArgumentError,
    BatchError,
    KnobError,
    NumericalError,
    PromptError,
    SpecgymError,
    Terminated,
    TrainingError,
    UnsupportedModelError,
    VocabularyMismatchError,
    check_fields,
    interruption_code,
    io_message,
    mapping_of,
    number,
    one_of,
    run_command,
    seed_number,
    sequence_of,
    text,
    whole_number,
)
from .files import cache_folder, digest, file_name, named_errors, remove_leftovers, replacing, write_json, write_text
from .latency.accelerators import HARDWARE, KINDS, Hardware, find_hardware
from .latency.deployments import Deployment, round_costs, sensible_deployments
from .latency.interleaved import describe_hardware
from .latency.measure import measure, measured
from .latency.mixed_measure import measure_mixed, measured_mixed
from .latency.mixed_profile import ChoiceCharges, DraftCosts, MixedProfile
from .latency.model_shapes import MODEL_SHAPES, ModelShape
from .latency.probe import CostProbe
from .latency.profile import LatencyProfile, LatencyProfileError, arithmetic_of
from .latency.roofline import roofline
from .loading.find_model import ModelNotFoundError, load_model
from .loading.hub_datasets import HUB_SETS
from .loading.memory import MemoryUse, memory_of
from .loading.pair import Pair, load_pair, require_draft
from .loading.presets import (
    PRESETS,
    ModelType,
    PlacementError,
    UnknownPairError,
    check_placement,
    default_placement,
    models_placed,
    place_models,
    resolve,
)
from .loading.prompt_tokens import (
    cut_ids,
    default_prompt_tokens,
    encode,
    encode_once,
    must_cut,
    prompt_limit,
    prompts_limited,
    warn_once,
)
from .models.early_exit import EarlyExit
from .models.identity import weights_digest
from .models.kv_cache import TokenTree
from .models.language_model import LanguageModel, Logits
from .models.linear_layers import SMALLEST_PREPACKED, prepack_linears
from .models.output_layer import bytes_of_pass
from .processors import TextRules, sampling_of, target_digest, text_settings
from .prompts import MEASURES, Measure, PromptSet, Split, load_prompts, shipped_prompts
from .registry import (
    DecoderRegistryError,
    build_decoder,
    decoder_class,
    decoder_names,
    environment_names,
    register,
    traits_of,
)
from .rounds import Generation, Round
from .sampling import GREEDY, Sampling, draw, likeliest_of_ten, total_variation
from .sealed_files import (
    FILES,
    DamagedFileError,
    check_digest,
    check_files,
    file_digests,
    read_arrays,
    read_sealed,
    write_arrays,
    write_sealed,
)
from .traits import CHAIN, EXACT, DecoderTraits, Knob, NoOptions, Sureness, TraceRule, doublings, from_doublings

__all__ = [
    "BINS", "CHAIN", "CHOICE_FEATURES", "DELTA", "ENGINE_SETTINGS", "EPSILON", "EXACT", "EXPORT_ENGINES", "FEATURES",
    "FILES", "GREEDY", "HARDWARE", "HUB_SETS", "KINDS", "LARGEST_SEED", "LARGEST_WHOLE", "LEVELS", "LOOKUP",
    "MEASURES", "MODEL_SHAPES", "MOST_DRAFTS", "MOST_THREADS", "PRESETS", "RULES", "SLOT_FEATURES",
    "SMALLEST_PREPACKED",
    "ArgumentError",
    "AutoregressiveDecoder",
    "Batch",
    "BatchError",
    "BeamSearchDecoder",
    "CascadeDrafter",
    "ChoiceCharges",
    "ChoiceRule",
    "ChoiceTracker",
    "ConfidenceBelow",
    "CostProbe",
    "DamagedFileError",
    "Decoder",
    "DecoderRegistryError",
    "DecoderTraits",
    "Deployment",
    "DraftCosts",
    "DraftSession",
    "DraftStep",
    "DraftTracker",
    "DraftTreeDecoder",
    "DraftTreeRound",
    "Drafter",
    "EagleDrafter",
    "EagleHead",
    "EagleHeadError",
    "EarlyExit",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineSettings",
    "EngineStop",
    "EngineText",
    "EntropyAbove",
    "ExpectedGain",
    "ExpectedGainChoice",
    "Export",
    "Feature",
    "FixedLength",
    "FollowAcceptance",
    "FurtherCosts",
    "Generation",
    "GgufSettings",
    "Hardware",
    "JacobiDecoder",
    "KeepChances",
    "Knob",
    "KnobError",
    "KnobRule",
    "LanguageModel",
    "LatencyProfile",
    "LatencyProfileError",
    "Logits",
    "LookaheadDecoder",
    "LookaheadRound",
    "LookaheadStatistics",
    "Measure",
    "MedusaDecoder",
    "MedusaHeads",
    "MemoryUse",
    "MixedDraft",
    "MixedProfile",
    "ModelDrafter",
    "ModelNotFoundError",
    "ModelShape",
    "ModelStep",
    "ModelType",
    "NGramDrafter",
    "NoOptions",
    "NumericalError",
    "OneHotStep",
    "Pair",
    "ParallelError",
    "PipelinedDecoder",
    "PipelinedThresholdDecoder",
    "PlacementError",
    "PoolSettings",
    "Preset",
    "ProductBelow",
    "PromptError",
    "PromptLookupDrafter",
    "PromptSet",
    "Proposal",
    "Retention",
    "Round",
    "RoundTracker",
    "Rows",
    "Sampling",
    "Served",
    "ServedSetting",
    "Session",
    "SettingIgnoredError",
    "Side",
    "SpecgymError",
    "SpeculativeDecoder",
    "SpeculativeSession",
    "Split",
    "StopRule",
    "SuffixDrafter",
    "Sureness",
    "Terminated",
    "TextRequest",
    "TextRules",
    "ThresholdDecoder",
    "TokenRule",
    "TokenTree",
    "TraceRule",
    "TrainingError",
    "TranslatedModel",
    "TypicalMedusaDecoder",
    "UnknownPairError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "arithmetic_of",
    "beside",
    "best_choice",
    "bins_of",
    "build_decoder",
    "bytes_of_pass",
    "cache_folder",
    "check_digest",
    "check_fields",
    "check_files",
    "check_placement",
    "cut_ids",
    "decode_in_turns",
    "decoder_class",
    "decoder_names",
    "default_placement",
    "default_prompt_tokens",
    "describe_hardware",
    "digest",
    "doublings",
    "draft_digest",
    "draft_models",
    "drafts_of",
    "draw",
    "encode",
    "encode_once",
    "engine_arguments",
    "engine_names",
    "environment_names",
    "export_setting",
    "file_digests",
    "file_name",
    "find_hardware",
    "from_doublings",
    "generate_texts",
    "heads_for",
    "interruption_code",
    "io_message",
    "is_free",
    "levels_of",
    "likeliest_of_ten",
    "load_head",
    "load_heads",
    "load_model",
    "load_pair",
    "load_prompts",
    "mapping_of",
    "measure",
    "measure_mixed",
    "measured",
    "measured_mixed",
    "memory_of",
    "models_placed",
    "must_cut",
    "named_errors",
    "number",
    "of_drafts",
    "one_of",
    "open_engine",
    "place_models",
    "places_of",
    "prepack_linears",
    "prompt_limit",
    "prompts_limited",
    "read_arrays",
    "read_sealed",
    "register",
    "remove_leftovers",
    "replacing",
    "require_choice",
    "require_draft",
    "resolve",
    "roofline",
    "round_costs",
    "round_features",
    "run_command",
    "sampling_of",
    "save_head",
    "seed_number",
    "sensible_deployments",
    "sequence_of",
    "setting_of_pair",
    "shipped_prompts",
    "takes_threshold",
    "target_digest",
    "text",
    "text_settings",
    "torchrun_group",
    "total_variation",
    "traits_of",
    "usual_acceptance",
    "usual_alignment",
    "warn_once",
    "weights_digest",
    "whole_number",
    "write_arrays",
    "write_gguf",
    "write_json",
    "write_sealed",
    "write_text",
]  # fmt: skip
