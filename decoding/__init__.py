"""Generating text with a target and a draft. Knows torch and transformers; knows nothing of reinforcement learning."""

from .autoregressive import AutoregressiveDecoder
from .decoder import Decoder, Generation, Knob, Round, Session
from .draft_tree import DraftTreeDecoder
from .drafters import Drafter, DraftSession, DraftStep, ModelDrafter, ModelStep, OneHotStep, Proposal
from .errors import (
    KnobError,
    NumericalError,
    PromptError,
    SpecgymError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from .lookahead import JacobiDecoder, LookaheadDecoder, PoolSettings
from .medusa import MedusaDecoder, MedusaHeads, TypicalMedusaDecoder, load_heads
from .models import LanguageModel, Logits
from .ngram import NGramDrafter
from .pairs import Pair, load_pair
from .prompt_lookup import PromptLookupDrafter
from .prompts import PromptSet, load_prompts
from .sampling import Sampling
from .speculative import SpeculativeDecoder
from .stopping import ConfidenceBelow, DraftTracker, EntropyAbove, FixedLength, ProductBelow, StopRule
from .threshold import ThresholdDecoder
from .tree import TokenTree

__all__ = [
    "AutoregressiveDecoder",
    "ConfidenceBelow",
    "Decoder",
    "DraftSession",
    "DraftStep",
    "DraftTracker",
    "DraftTreeDecoder",
    "Drafter",
    "EntropyAbove",
    "FixedLength",
    "Generation",
    "JacobiDecoder",
    "Knob",
    "KnobError",
    "LanguageModel",
    "Logits",
    "LookaheadDecoder",
    "MedusaDecoder",
    "MedusaHeads",
    "ModelDrafter",
    "ModelStep",
    "NGramDrafter",
    "NumericalError",
    "OneHotStep",
    "Pair",
    "PoolSettings",
    "ProductBelow",
    "PromptError",
    "PromptLookupDrafter",
    "PromptSet",
    "Proposal",
    "Round",
    "Sampling",
    "Session",
    "SpecgymError",
    "SpeculativeDecoder",
    "StopRule",
    "ThresholdDecoder",
    "TokenTree",
    "TypicalMedusaDecoder",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "load_heads",
    "load_pair",
    "load_prompts",
]
