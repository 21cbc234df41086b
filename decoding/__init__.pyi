from .decoder import Decoder, Generation, Round, Session
from .decoders.autoregressive import AutoregressiveDecoder, Side, decode_in_turns
from .decoders.chain import SpeculativeDecoder, SpeculativeSession, ThresholdDecoder
from .decoders.draft_tree.decoder import DraftTreeDecoder, DraftTreeRound
from .decoders.draft_tree.files import usual_acceptance, usual_alignment
from .decoders.draft_tree.pruning import RULES
from .decoders.expected_gain import BINS, LEVELS, ExpectedGain, KeepChances, bins_of, levels_of
from .decoders.lookahead.decoder import JacobiDecoder, LookaheadDecoder, LookaheadRound, LookaheadStatistics
from .decoders.lookahead.pool import PoolSettings, Retention
from .decoders.lookahead.traits import Preset
from .decoders.medusa.decoder import MedusaDecoder, TypicalMedusaDecoder
from .decoders.medusa.files import heads_for, load_heads
from .decoders.medusa.heads import MedusaHeads
from .decoders.medusa.traits import DELTA, EPSILON
from .decoders.stop_rules import (
    FEATURES,
    ConfidenceBelow,
    DraftTracker,
    EntropyAbove,
    FixedLength,
    ProductBelow,
    Rows,
    StopRule,
)
from .drafts.drafter import (
    Drafter,
    DraftSession,
    DraftStep,
    ModelDrafter,
    ModelStep,
    OneHotStep,
    Proposal,
    draft_digest,
)
from .drafts.ngram import NGramDrafter, PromptLookupDrafter
from .errors import (
    KnobError,
    NumericalError,
    PromptError,
    SpecgymError,
    UnsupportedModelError,
    VocabularyMismatchError,
    require_positive,
)
from .files import cache_folder, digest, file_name, replacing, write_json, write_text
from .latency.accelerators import find_hardware
from .latency.interleaved import describe_hardware
from .latency.measure import measure, measured
from .latency.probe import CostProbe
from .latency.profile import LatencyProfile, LatencyProfileError, arithmetic_of
from .latency.roofline import MODEL_SHAPES, ModelShape, roofline
from .loading.find_model import ModelNotFoundError, load_model
from .loading.pair import MemoryUse, Pair, load_pair, memory_of, require_draft
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
from .models.kv_cache import TokenTree
from .models.language_model import LanguageModel, Logits, weights_digest
from .models.linear_layers import SMALLEST_PREPACKED, prepack_linears
from .prompts import HUB_SETS, PromptSet, Split, encode, load_prompts, shipped_prompts
from .registry import (
    DecoderRegistryError,
    build_decoder,
    decoder_class,
    decoder_names,
    environment_names,
    register,
    traits_of,
)
from .sampling import GREEDY, Sampling, draw, total_variation
from .traits import CHAIN, EXACT, DecoderTraits, Knob, NoOptions, TraceRule

__all__ = [
    "BINS",
    "CHAIN",
    "DELTA",
    "EPSILON",
    "EXACT",
    "FEATURES",
    "GREEDY",
    "HUB_SETS",
    "LEVELS",
    "MODEL_SHAPES",
    "PRESETS",
    "RULES",
    "SMALLEST_PREPACKED",
    "AutoregressiveDecoder",
    "ConfidenceBelow",
    "CostProbe",
    "Decoder",
    "DecoderRegistryError",
    "DecoderTraits",
    "DraftSession",
    "DraftStep",
    "DraftTracker",
    "DraftTreeDecoder",
    "DraftTreeRound",
    "Drafter",
    "EntropyAbove",
    "ExpectedGain",
    "FixedLength",
    "Generation",
    "JacobiDecoder",
    "KeepChances",
    "Knob",
    "KnobError",
    "LanguageModel",
    "LatencyProfile",
    "LatencyProfileError",
    "Logits",
    "LookaheadDecoder",
    "LookaheadRound",
    "LookaheadStatistics",
    "MedusaDecoder",
    "MedusaHeads",
    "MemoryUse",
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
    "Rows",
    "Sampling",
    "Session",
    "Side",
    "SpecgymError",
    "SpeculativeDecoder",
    "SpeculativeSession",
    "Split",
    "StopRule",
    "ThresholdDecoder",
    "TokenTree",
    "TraceRule",
    "TypicalMedusaDecoder",
    "UnknownPairError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "arithmetic_of",
    "bins_of",
    "build_decoder",
    "cache_folder",
    "check_placement",
    "decode_in_turns",
    "decoder_class",
    "decoder_names",
    "default_placement",
    "describe_hardware",
    "digest",
    "draft_digest",
    "draw",
    "encode",
    "environment_names",
    "file_name",
    "find_hardware",
    "heads_for",
    "levels_of",
    "load_heads",
    "load_model",
    "load_pair",
    "load_prompts",
    "measure",
    "measured",
    "memory_of",
    "models_placed",
    "place_models",
    "prepack_linears",
    "register",
    "replacing",
    "require_draft",
    "require_positive",
    "resolve",
    "roofline",
    "shipped_prompts",
    "total_variation",
    "traits_of",
    "usual_acceptance",
    "usual_alignment",
    "weights_digest",
    "write_json",
    "write_text",
]
