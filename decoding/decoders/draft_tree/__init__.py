"""Decoding with a draft tree: growing it, guiding and pruning its growth, and verifying it."""

from .alignment import AffineAlignment, RidgeFit, proposals
from .decoder import DraftTreeDecoder, DraftTreeRound, draft_tree_knobs
from .errors import DraftTreeModelError
from .files import load_acceptance, load_alignment, save_acceptance, save_alignment, usual_acceptance, usual_alignment
from .predictor import AcceptancePredictor, NodeFeatures, PredictorShape
from .pruning import PRUNERS, AbsolutePruner, LevelPruner, RatioPruner, ThroughputPruner, TreePruner
from .verification_rules import RULES, Distinct, Independent, Likeliest, Rule

__all__ = [
    "PRUNERS",
    "RULES",
    "AbsolutePruner",
    "AcceptancePredictor",
    "AffineAlignment",
    "Distinct",
    "DraftTreeDecoder",
    "DraftTreeModelError",
    "DraftTreeRound",
    "Independent",
    "LevelPruner",
    "Likeliest",
    "NodeFeatures",
    "PredictorShape",
    "RatioPruner",
    "RidgeFit",
    "Rule",
    "ThroughputPruner",
    "TreePruner",
    "draft_tree_knobs",
    "load_acceptance",
    "load_alignment",
    "proposals",
    "save_acceptance",
    "save_alignment",
    "usual_acceptance",
    "usual_alignment",
]
