"""Pipelined decoding: while the target verifies a round, the draft goes on as if all of it were accepted.

Post-verify and pre-verify of PEARL (Liu et al., arXiv 2408.11850). A *bet* is that all tokens of a round pass, and so
does the first of those that are drafted meanwhile: the round's last scores are what that one is tested against. If the
bet is won, the rest of what was drafted is ready for the next round; if not, it is dropped. With nothing ready, after a
rejection, the target reads the last token alone, and the draft's first token is tested by that (pre-verify), so that
no round takes longer than a step of plain decoding where the draft is fast enough; or it waits for a draft.

Which tokens are verified depends on earlier tokens and the knobs alone, and each takes its own test, so the text is as
exact as that of speculative sampling. A round that wins its bet emits no token of the target's: the last one accepted
is read with the next round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ...drafts.drafter import ModelDrafter, Proposal
from ...errors import ArgumentError
from ...latency.probe import CostProbe
from ...loading.pair import Pair
from ...models.early_exit import ExitModel
from ...models.encoder.encoder_decoder import EncoderDecoder
from ..chain import USUAL_COST_RATIO, ChainDecoder
from ..chain_session import Verdict
from ..stop_rules import DraftTracker, StopRule
from .session import PipelinedSession, PipelinedThresholdSession
from .traits import PipelinedThresholdTraits, PipelinedTraits, Place
from .worker import DraftWorker, can_fork

_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)


class Pipeline(ChainDecoder):
    """Base of pipelined decoders.

    Args:
        pair: a target with a draft model of its own weights.
        max_draft_length: upper end of the `draft_length` knob, in tokens.
        place: see `PipelinedOptions`.
        draft_threads: likewise.
        pin: likewise.
        stop: rule that may end a draft before it is as long as it may be; the draft asks it while the target is at
            work, so that what it takes costs nothing. In a process it learns there, and the one given here does not.
        cost_ratio: see `ChainDecoder`.
        batch_size: likewise.

    Raises:
        ValueError: the pair has no such draft, or an option is out of range or cannot be had here.
    """

    keeps_rows = False
    """Read by the verification when greedy, too: the rows of scores that drafted tokens come from."""

    def __init__(
        self,
        pair: Pair,
        max_draft_length: int = 16,
        place: Place = "auto",
        draft_threads: int = 1,
        pin: bool = False,
        stop: StopRule | None = None,
        cost_ratio: float = USUAL_COST_RATIO,
        batch_size: int = 1,
    ) -> None:
        super().__init__(pair)
        options = {"max_draft_length": max_draft_length, "place": place, "draft_threads": draft_threads, "pin": pin}
        self.knobs = self.knobs_without_pair(**options)
        _require_own_model(pair, type(self).__name__)
        DraftTracker(1, cost_ratio, batch_size)  # refuses what the sessions' own would refuse
        self.cost_ratio, self.batch_size = cost_ratio, batch_size
        if stop is not None:
            stop.start(1, seed=0)
        self.stop, self.max_draft_length, self.draft_threads = stop, max_draft_length, draft_threads
        self.place: Place = _place(pair, place)
        self._cores = _last_core() if pin else ()
        self._idle: list[DraftWorker] = []

    def __getstate__(self) -> dict[str, object]:
        """Return what copies have: all but the workers, whose pipes a copy would close."""
        return {**vars(self), "_idle": []}

    @property
    def threads_left(self) -> int:
        """Threads of torch that the target has; 0 for all, where it is on an accelerator."""
        return 0 if self.pair.target.device.type != "cpu" else max(1, torch.get_num_threads() - self.draft_threads)

    def draft_length(self, knobs: Mapping[str, float]) -> int:
        """Return the tokens drafted at a time."""
        return int(knobs["draft_length"])

    def cost_probe(self, max_target_tokens: int | None = None) -> CostProbe:
        """Return rounds of pipelined decoding that win every bet, by the tokens of a draft."""
        most = self.max_draft_length if max_target_tokens is None else min(self.max_draft_length, max_target_tokens)
        sizes = sorted({*(size for size in _SIZES if size <= most), most})
        detail = {"draft_threads": self.draft_threads, "place": self.place, "pinned": bool(self._cores)}
        return CostProbe(
            _Winning(self.pair, most, self.place, self.draft_threads, bool(self._cores)),
            sizes,
            lambda size: {"draft_length": size, "pre_verify": 1},
            detail={"pipeline": detail},
            overlaps=True,
            drafting=sizes,
            room_for=lambda size: 3 * size,  # a round that reads one token, and one that reads what was drafted then
        )

    def worker(self) -> DraftWorker:
        """Return what drafts for a text, which nobody else uses until it is given back."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
        return DraftWorker(
            self.pair,
            self.max_draft_length,
            rows=self.keeps_rows,
            place=self.place,
            cores=self._cores,
            stop=self.stop,
        )

    def give_back(self, worker: DraftWorker) -> None:
        """Take what drafted for a text back, for another; one that is lost is forgotten."""
        if worker.alive:
            self._idle.append(worker)


class PipelinedDecoder(PipelinedTraits, Pipeline):
    """Exact speculative sampling in which the draft goes on while the target verifies. Arguments as for its base."""

    session_class = PipelinedSession


class PipelinedThresholdDecoder(PipelinedThresholdTraits, Pipeline):
    """Threshold decoding in which the draft goes on while the target verifies; lossy unless `fallback` is 0.

    A rollback takes back tokens of its own round, never those of a bet that was won before. Arguments as for its base.
    """

    session_class = PipelinedThresholdSession
    keeps_rows = True


class _WinningSession(PipelinedSession):
    """A text in which every token is kept, after it was verified: rounds of all sizes come, whatever the models say.

    The draft is at work all the time, as cores that share a memory or a cache slow each other down. Whoever asks for
    fewer tokens drops the others.
    """

    def _ask(self, count: int) -> None:
        super()._ask(count and self._pipeline.max_draft_length)

    def _judge(self, scores: Tensor, proposal: Proposal, knobs: Mapping[str, float]) -> Verdict:
        verdict = super()._judge(scores, proposal, knobs)
        return verdict._replace(kept=torch.full_like(verdict.kept, proposal.tokens.shape[0]))


class _Winning(PipelinedDecoder):
    session_class = _WinningSession


def _require_own_model(pair: Pair, user: str) -> None:
    draft = pair.draft
    if type(draft) is not ModelDrafter or isinstance(draft.model, ExitModel | EncoderDecoder):
        raise ArgumentError(
            f"{user} needs a draft model that can work while the target does, and {pair.name} drafts by "
            f"{draft.name if draft else 'nothing'}, which reads the target's own states, or takes no time. Give a pair "
            "with a draft model, or use SpeculativeDecoder"
        )


def _place(pair: Pair, asked: Place) -> Place:
    """Return where a draft works, or refuse where it cannot."""
    if asked == "process" and not can_fork(pair):
        raise ArgumentError(
            "place='process' forks, which takes Linux, a draft on a CPU, and a process that may have children; give "
            "place='thread'"
        )
    return asked if asked != "auto" else "process" if can_fork(pair) else "thread"


def _last_core() -> tuple[int, ...]:
    """The last core that this process may use, as a set to be bound to.

    Raises:
        ArgumentError: the system binds no threads, or there is one core.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        raise ArgumentError(f"pin=True binds the draft to a core of its own, on Linux, and there are {len(cores)} here")
    return (cores[-1],)
