"""Medusa decoding: heads on the target, trees of their candidates, and what of these is accepted."""

from .decoder import MedusaDecoder, MedusaRound, TypicalMedusaDecoder, medusa_knobs
from .files import heads_for, load_heads, save_heads
from .heads import HeadsShape, MedusaHeads, MedusaHeadsError
from .trees import CandidateTree, cartesian, expected_length, sparse

__all__ = [
    "CandidateTree",
    "HeadsShape",
    "MedusaDecoder",
    "MedusaHeads",
    "MedusaHeadsError",
    "MedusaRound",
    "TypicalMedusaDecoder",
    "cartesian",
    "expected_length",
    "heads_for",
    "load_heads",
    "medusa_knobs",
    "save_heads",
    "sparse",
]
