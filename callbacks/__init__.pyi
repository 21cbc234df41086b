from .checkpoints import Checkpoint, CheckpointError, FolderCheckpointCallback, intact_checkpoints
from .decoding_metrics import DecodingMetricsCallback
from .divergence_bound import DivergenceBoundCallback
from .early_stop import EarlyStopCallback
from .entropy import EntropyScheduleCallback
from .plateau import PlateauCallback
from .replay.prioritised import PrioritisedReplayCallback, ReplaySettings
from .resumable import Resumable
from .workload_priorities import WorkloadPriorities

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DecodingMetricsCallback",
    "DivergenceBoundCallback",
    "EarlyStopCallback",
    "EntropyScheduleCallback",
    "FolderCheckpointCallback",
    "PlateauCallback",
    "PrioritisedReplayCallback",
    "ReplaySettings",
    "Resumable",
    "WorkloadPriorities",
    "intact_checkpoints",
]
