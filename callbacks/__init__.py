"""Stable-Baselines3 callbacks: what decoding did, and checkpoints that are whole or not there."""

from .checkpoints import CheckpointError, FolderCheckpointCallback, intact_checkpoints
from .decoding_metrics import DecodingMetricsCallback

__all__ = ["CheckpointError", "DecodingMetricsCallback", "FolderCheckpointCallback", "intact_checkpoints"]
