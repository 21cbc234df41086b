from .decoder import GREEDY, Decoder, Generation, Knob, Round, Session
from .decoders.autoregressive import AutoregressiveDecoder
from .decoders.draft_tree import (
    RULES,
    DraftTreeDecoder,
    DraftTreeRound,
    draft_tree_knobs,
    usual_acceptance,
    usual_alignment,
)
from .decoders.in_turns import Side, decode_in_turns
from .decoders.lookahead import (
    JacobiDecoder,
    LookaheadDecoder,
    LookaheadRound,
    LookaheadStatistics,
    PoolSettings,
    lookahead_knobs,
)
from .decoders.lookahead.decoder import LOOKAHEAD_PRESETS, Preset
from .decoders.lookahead.pool import Retention
from .decoders.medusa import MedusaDecoder, MedusaHeads, TypicalMedusaDecoder, heads_for, load_heads, medusa_knobs
from .decoders.medusa.decoder import DELTA, EPSILON, typical_knobs
from .decoders.speculative import (
    SpeculativeDecoder,
    SpeculativeSession,
    require_draft,
    require_positive,
    speculative_knobs,
)
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
from .decoders.threshold import ThresholdDecoder, threshold_knobs
from .drafts.drafter import Drafter, DraftSession, DraftStep, ModelDrafter, ModelStep, OneHotStep, Proposal
from .drafts.ngram import NGramDrafter
from .drafts.prompt_lookup import PromptLookupDrafter
from .errors import KnobError, NumericalError, PromptError, SpecgymError, UnsupportedModelError, VocabularyMismatchError
from .files import digest, file_name, replacing, write_json, write_text
from .latency.accelerators import find_hardware
from .latency.host import describe_hardware
from .latency.measure import measure, measured
from .latency.profile import LatencyProfile, LatencyProfileError, arithmetic_of
from .latency.roofline import ModelShape, roofline
from .latency.round_kinds import (
    CHAIN,
    DRAFT_TREE,
    DRAFTED,
    LOOKAHEAD,
    MEDUSA,
    MEDUSA_TYPICAL,
    OF_HEADS,
    Rounds,
    timed_as,
)
from .loading.find_model import ModelNotFoundError, load_model
from .loading.pair import Pair, load_pair
from .loading.presets import PRESETS, UnknownPairError, resolve
from .models.language_model import LanguageModel, Logits
from .models.prepack import SMALLEST_PREPACKED, prepack_linears
from .models.token_tree import TokenTree
from .models.weight_hashes import draft_digest, guidance_digest, heads_digest, weights_digest
from .prompts.hub_datasets import HUB_SETS
from .prompts.prompt_set import PromptSet, Split, encode, load_prompts, shipped_prompts
from .sampling import Sampling, draw, total_variation

__all__ = [
    "CHAIN",
    "DELTA",
    "DRAFTED",
    "DRAFT_TREE",
    "EPSILON",
    "FEATURES",
    "GREEDY",
    "HUB_SETS",
    "LOOKAHEAD",
    "LOOKAHEAD_PRESETS",
    "MEDUSA",
    "MEDUSA_TYPICAL",
    "OF_HEADS",
    "PRESETS",
    "RULES",
    "SMALLEST_PREPACKED",
    "AutoregressiveDecoder",
    "ConfidenceBelow",
    "Decoder",
    "DraftSession",
    "DraftStep",
    "DraftTracker",
    "DraftTreeDecoder",
    "DraftTreeRound",
    "Drafter",
    "EntropyAbove",
    "FixedLength",
    "Generation",
    "JacobiDecoder",
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
    "ModelDrafter",
    "ModelNotFoundError",
    "ModelShape",
    "ModelStep",
    "NGramDrafter",
    "NumericalError",
    "OneHotStep",
    "Pair",
    "PoolSettings",
    "Preset",
    "ProductBelow",
    "PromptError",
    "PromptLookupDrafter",
    "PromptSet",
    "Proposal",
    "Retention",
    "Round",
    "Rounds",
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
    "TypicalMedusaDecoder",
    "UnknownPairError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "arithmetic_of",
    "decode_in_turns",
    "describe_hardware",
    "digest",
    "draft_digest",
    "draft_tree_knobs",
    "draw",
    "encode",
    "file_name",
    "find_hardware",
    "guidance_digest",
    "heads_digest",
    "heads_for",
    "load_heads",
    "load_model",
    "load_pair",
    "load_prompts",
    "lookahead_knobs",
    "measure",
    "measured",
    "medusa_knobs",
    "prepack_linears",
    "replacing",
    "require_draft",
    "require_positive",
    "resolve",
    "roofline",
    "shipped_prompts",
    "speculative_knobs",
    "threshold_knobs",
    "timed_as",
    "total_variation",
    "typical_knobs",
    "usual_acceptance",
    "usual_alignment",
    "weights_digest",
    "write_json",
    "write_text",
]
