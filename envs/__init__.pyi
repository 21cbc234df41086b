from .backends.backend import Backend, Metrics
from .backends.chain_replay import DraftTable
from .backends.live import decode_prompts, measure_setting, metrics_of, summarise
from .backends.outcome_replay import OutcomeReplay, require_tokens
from .backends.replay import replay_backend
from .backends.replay_table import ReplayTable
from .backends.trace_replay import TraceReplay, TraceWalk
from .control.env import LONGEST, DraftLengthEnv
from .control.vector_env import DraftLengthVectorEnv
from .profiles import profile_of
from .prompt_order import PromptOrder, prompts_at
from .ray_cluster import WorkerError, cluster, gpus_for, named_node, on_ray, ray_errors
from .recordings.archive import TraceError
from .recordings.find import (
    find_recording,
    find_trace,
    is_traced,
    outcome_command,
    practised_workloads,
    record_command,
    recorded_workloads,
    recording_name,
    trace_in,
)
from .recordings.outcomes import Outcomes, outcomes_name, totals
from .recordings.trace import Trace, trace_name
from .registration import environment_id, register, register_environments
from .tuning.env import TuningEnv
from .tuning.knob_space import KnobMoves, doublings, from_doublings
from .tuning.observe import ContextLayout, ObserveContext, VectorObserveContext, VectorWorkloadMark, WorkloadMark
from .tuning.reward import DIVERGENCE_BOUND, RewardSettings, preferred_ranges, reward_terms
from .tuning.vector_env import TuningVectorEnv
from .workers import Task, run_tasks
from .workloads import SHIPPED_WORKLOADS, TokenPrompts, Workload, shared_out, workload

__all__ = [
    "DIVERGENCE_BOUND",
    "LONGEST",
    "SHIPPED_WORKLOADS",
    "Backend",
    "ContextLayout",
    "DraftLengthEnv",
    "DraftLengthVectorEnv",
    "DraftTable",
    "KnobMoves",
    "Metrics",
    "ObserveContext",
    "OutcomeReplay",
    "Outcomes",
    "PromptOrder",
    "ReplayTable",
    "RewardSettings",
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
    "WorkerError",
    "Workload",
    "WorkloadMark",
    "cluster",
    "decode_prompts",
    "doublings",
    "environment_id",
    "find_recording",
    "find_trace",
    "from_doublings",
    "gpus_for",
    "is_traced",
    "measure_setting",
    "metrics_of",
    "named_node",
    "on_ray",
    "outcome_command",
    "outcomes_name",
    "practised_workloads",
    "preferred_ranges",
    "profile_of",
    "prompts_at",
    "ray_errors",
    "record_command",
    "recorded_workloads",
    "recording_name",
    "register",
    "register_environments",
    "replay_backend",
    "require_tokens",
    "reward_terms",
    "run_tasks",
    "shared_out",
    "summarise",
    "totals",
    "trace_in",
    "trace_name",
    "workload",
]
