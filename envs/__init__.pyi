from .backends.backend import Backend, Metrics
from .backends.chain_replay import DraftTable
from .backends.choice_replay import ChoiceTable
from .backends.engine import ComparedText, EngineBackend
from .backends.live import decode_prompts, measure_setting, metrics_of, summarise
from .backends.outcome_replay import OutcomeReplay, require_tokens
from .backends.pipelined_replay import PipelinedReplay
from .backends.replay import EngineCounts, engine_counts, replay_backend
from .backends.replay_table import ReplayTable
from .backends.trace_replay import TraceReplay, TraceWalk
from .control.choice_env import DraftChoiceEnv
from .control.choice_vector_env import DraftChoiceVectorEnv
from .control.control_env import LONGEST
from .control.control_vector_env import ControlVectorEnv
from .control.env import DraftLengthEnv
from .control.round_env import RoundKnobsEnv, RoundKnobsVectorEnv
from .control.vector_env import DraftLengthVectorEnv
from .profiles import mixed_profile_of, profile_of
from .prompt_order import PromptOrder, prompts_at
from .ray_cluster import MOST_LOST, WorkerError, cluster, named_node, on_ray, ray_errors, share_of
from .recordings.archive import TraceError
from .recordings.find import (
    find_mixed_trace,
    find_recording,
    find_trace,
    is_traced,
    mixed_trace_in,
    mixed_workloads,
    outcome_command,
    practised_workloads,
    record_command,
    recorded_workloads,
    recording_name,
    trace_in,
)
from .recordings.mixed_trace import MixedTrace
from .recordings.outcomes import Outcomes, outcomes_name, totals
from .recordings.trace import Trace, tellable_threshold, trace_name
from .registration import environment_id, register, register_environments
from .tuning.engine_env import EngineEnv, EngineVectorEnv
from .tuning.env import TuningEnv
from .tuning.knob_space import ACTION_KINDS, KnobMoves
from .tuning.observe import ContextLayout, ObserveContext, VectorObserveContext, VectorWorkloadMark, WorkloadMark
from .tuning.reward import DIVERGENCE_BOUND, RewardSettings, preferred_ranges, reward_terms
from .tuning.vector_env import TuningVectorEnv
from .workers import Task, run_tasks
from .workloads import SHIPPED_WORKLOADS, TokenPrompts, Workload, shared_out, workload
from .worlds.acceptance import (
    LENGTHS,
    LEVELS,
    SETTINGS,
    THRESHOLDS,
    Rows,
    Warp,
    count_rounds,
    length_of,
    setting_of,
    threshold_of,
)
from .worlds.beliefs import MOST_MEASUREMENTS, PROFILED, Beliefs, Facts, observation_names
from .worlds.catalogue import (
    AXES,
    HELD_OUT_BATCH_SIZES,
    HELD_OUT_CLASSES,
    HELD_OUT_PAIRS,
    HELD_OUT_TEMPERATURES,
    Axis,
    charges,
    held_out_sampler,
    held_out_workloads,
    training_sampler,
    training_workloads,
)
from .worlds.env import RETICENT, WorldsEnv, WorldsVectorEnv
from .worlds.pool import AcceptancePool, Source
from .worlds.real_pairs import LivePair, RealWorld, ReplayedPair, knobs_of, real_world
from .worlds.worlds import BATCH_SIZES, ENGINE_NAMES, ENGINES, PROMPTS, Charges, Readings, Worlds, WorldSampler

__all__ = [
    "ACTION_KINDS",
    "AXES",
    "BATCH_SIZES",
    "DIVERGENCE_BOUND",
    "ENGINES",
    "ENGINE_NAMES",
    "HELD_OUT_BATCH_SIZES",
    "HELD_OUT_CLASSES",
    "HELD_OUT_PAIRS",
    "HELD_OUT_TEMPERATURES",
    "LENGTHS",
    "LEVELS",
    "LONGEST",
    "MOST_LOST",
    "MOST_MEASUREMENTS",
    "PROFILED",
    "PROMPTS",
    "RETICENT",
    "SETTINGS",
    "SHIPPED_WORKLOADS",
    "THRESHOLDS",
    "AcceptancePool",
    "Axis",
    "Backend",
    "Beliefs",
    "Charges",
    "ChoiceTable",
    "ComparedText",
    "ContextLayout",
    "ControlVectorEnv",
    "DraftChoiceEnv",
    "DraftChoiceVectorEnv",
    "DraftLengthEnv",
    "DraftLengthVectorEnv",
    "DraftTable",
    "EngineBackend",
    "EngineCounts",
    "EngineEnv",
    "EngineVectorEnv",
    "Facts",
    "KnobMoves",
    "LivePair",
    "Metrics",
    "MixedTrace",
    "ObserveContext",
    "OutcomeReplay",
    "Outcomes",
    "PipelinedReplay",
    "PromptOrder",
    "Readings",
    "RealWorld",
    "ReplayTable",
    "ReplayedPair",
    "RewardSettings",
    "RoundKnobsEnv",
    "RoundKnobsVectorEnv",
    "Rows",
    "Source",
    "Task",
    "TokenPrompts",
    "Trace",
    "TraceError",
    "TraceReplay",
    "TraceWalk",
    "TuningEnv",
    "TuningVectorEnv",
    "VectorObserveContext",
    "VectorWorkloadMark",
    "Warp",
    "WorkerError",
    "Workload",
    "WorkloadMark",
    "WorldSampler",
    "Worlds",
    "WorldsEnv",
    "WorldsVectorEnv",
    "charges",
    "cluster",
    "count_rounds",
    "decode_prompts",
    "engine_counts",
    "environment_id",
    "find_mixed_trace",
    "find_recording",
    "find_trace",
    "held_out_sampler",
    "held_out_workloads",
    "is_traced",
    "knobs_of",
    "length_of",
    "measure_setting",
    "metrics_of",
    "mixed_profile_of",
    "mixed_trace_in",
    "mixed_workloads",
    "named_node",
    "observation_names",
    "on_ray",
    "outcome_command",
    "outcomes_name",
    "practised_workloads",
    "preferred_ranges",
    "profile_of",
    "prompts_at",
    "ray_errors",
    "real_world",
    "record_command",
    "recorded_workloads",
    "recording_name",
    "register",
    "register_environments",
    "replay_backend",
    "require_tokens",
    "reward_terms",
    "run_tasks",
    "setting_of",
    "share_of",
    "shared_out",
    "summarise",
    "tellable_threshold",
    "threshold_of",
    "totals",
    "trace_in",
    "trace_name",
    "training_sampler",
    "training_workloads",
    "workload",
]
