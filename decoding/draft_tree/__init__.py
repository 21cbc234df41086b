"""Draft trees: an affine alignment of a draft's hidden states, and the prediction of what a target will accept."""

from .alignment import AffineAlignment, RidgeFit, proposals
from .errors import DraftTreeModelError
from .files import (
    load_acceptance,
    load_alignment,
    save_acceptance,
    save_alignment,
    usual_acceptance,
    usual_alignment,
)
from .predictor import AcceptancePredictor, NodeFeatures, PredictorShape

__all__ = [
    "AcceptancePredictor",
    "AffineAlignment",
    "DraftTreeModelError",
    "NodeFeatures",
    "PredictorShape",
    "RidgeFit",
    "load_acceptance",
    "load_alignment",
    "proposals",
    "save_acceptance",
    "save_alignment",
    "usual_acceptance",
    "usual_alignment",
]
