from .backends.chain_replay import DraftTable
from .backends.metrics import decode_prompts, measure_setting, metrics, summarise
from .backends.outcome_replay import OutcomeReplay, require_tokens
from .backends.outcome_totals import totals
from .backends.replay_table import ReplayTable
from .backends.sources import prepared
from .backends.trace_replay import LOSSLESS, Replay
from .control.env import LONGEST, DraftLengthEnv
from .control.vector_env import DraftLengthVectorEnv
from .profiles import profile_of
from .recordings.archive import TraceError
from .recordings.outcomes import Outcomes, outcomes_name
from .recordings.shipped_outcomes import find_recording, outcome_command
from .recordings.shipped_traces import find_trace, record_command, trace_in
from .recordings.trace import Trace, trace_name
from .registration import register_environments
from .tuning.env import TuningEnv
from .tuning.knob_space import KnobMoves
from .tuning.knobs import doublings, from_doublings
from .tuning.observe import ContextLayout, ObserveContext
from .tuning.reward import RewardSettings, reward_terms
from .tuning.vector_env import TuningVectorEnv
from .tuning.vector_observe import VectorObserveContext
from .workload_shares import shared_out
from .workloads import SHIPPED_WORKLOADS, TokenPrompts, Workload, workload

__all__ = [
    "LONGEST",
    "LOSSLESS",
    "SHIPPED_WORKLOADS",
    "ContextLayout",
    "DraftLengthEnv",
    "DraftLengthVectorEnv",
    "DraftTable",
    "KnobMoves",
    "ObserveContext",
    "OutcomeReplay",
    "Outcomes",
    "Replay",
    "ReplayTable",
    "RewardSettings",
    "TokenPrompts",
    "Trace",
    "TraceError",
    "TuningEnv",
    "TuningVectorEnv",
    "VectorObserveContext",
    "Workload",
    "decode_prompts",
    "doublings",
    "find_recording",
    "find_trace",
    "from_doublings",
    "measure_setting",
    "metrics",
    "outcome_command",
    "outcomes_name",
    "prepared",
    "profile_of",
    "record_command",
    "register_environments",
    "require_tokens",
    "reward_terms",
    "shared_out",
    "summarise",
    "totals",
    "trace_in",
    "trace_name",
    "workload",
]
