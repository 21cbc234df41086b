"""On-policy distillation: rounds in which a draft also learns from text that it wrote itself, as the target reads it.

On the target's text a draft never sees where its own tokens lead. Agarwal et al., "On-Policy Distillation of Language
Models" (GKD, arXiv 2306.13649); for drafts Zhou et al., "DistillSpec" (arXiv 2310.08461).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..loop import Outcome, train
from ..measure import context_of
from ..settings import LoopSettings, TextSettings
from ..text.corpus_text import TEXTS, Batches, PositionBatches
from ..text.prompts import TRAINING, Prompts
from ..text.states import HiddenStates, hidden_states, join_states
from ..text.target_text import TargetText, generate_text
from .objectives import Objective, teacher_of, text_loss

TEMPERATURE = 1.0
"""Temperature at which the draft writes: what it learns from is its distribution, not what is likeliest in it."""


@dataclass(frozen=True)
class OnPolicyText:
    """Text of a draft in training.

    Attributes:
        draft: writes it.
        target: reads it.
        prompts: those of the target's own text, of which the draft continues some of `TRAINING`.
        ends: tokens that end a text.
        writing: how the target's text was generated; the draft's is as long.
        loop: batch, seed, precision and folder.
    """

    draft: PreTrainedModel
    target: PreTrainedModel
    prompts: Sequence[Prompts]
    ends: Collection[int]
    writing: TextSettings
    loop: LoopSettings

    def write(self, number: int, count: int) -> TargetText:
        """Text by the draft as it is now, or read from what an earlier call with the same weights stored.

        Args:
            number: of the round, which chooses the prompts.
            count: texts; fewer if there are fewer prompts.
        """
        rows = [
            row
            for some in self.prompts
            for row, side in zip(some.rows, some.side.tolist(), strict=True)
            if side == TRAINING
        ]
        chosen = np.random.default_rng((self.loop.seed, number)).permutation(len(rows))[:count]
        none = np.zeros(len(chosen), dtype=np.int64)
        asked = Prompts([rows[n] for n in chosen], none, none + TRAINING, ("on-policy text",), [], {}, {}).by_length()
        longest = len(asked.rows[-1])
        room = context_of(self.target) - longest
        how = replace(
            self.writing,
            texts=len(chosen),
            prompt_tokens=longest,
            new_tokens=min(self.writing.new_tokens, room),
            temperature=TEMPERATURE,
        )
        self.draft.eval()
        return generate_text(self.draft, self.ends, asked, how, self.loop.seed, self.loop.work)

    def states(self, number: int, count: int) -> HiddenStates:
        """Hidden states of the target along text that the draft writes now; arguments as of `write`."""
        return hidden_states(self.target, self.write(number, count), bfloat16=self.loop.bfloat16)


class MixedBatches:
    """Batches of texts, a part of which come from the target and the rest from the draft.

    Args:
        target: batches of the target's texts.
        draft: batches of the draft's, by steps from ``first`` on.
        first: step of the run at which the round begins.
    """

    def __init__(self, target: Batches, draft: Batches, first: int) -> None:
        self._target, self._draft, self._first = target, draft, first

    def __call__(self, step: int) -> Tensor:
        """Numbers of the texts of one step, those of the target first, shape (batch,), int64."""
        return torch.cat([self._target(step), self._draft(step - self._first)])

    def digest(self) -> str:
        """SHA-256 of everything that the batches depend on, 64 hex digits."""
        words = f"{self._target.digest()} {self._draft.digest()} {self._first}"
        return hashlib.sha256(words.encode()).hexdigest()


def round_objective(
    objective: Objective, states: HiddenStates, text: OnPolicyText, divergence: str, number: int, first: int, steps: int
) -> Objective:
    """The objective of one round: half of each batch is text that the draft, as it is now, writes.

    Args:
        objective: the one without rounds.
        states: of the target along its own text.
        text: writes the draft's.
        divergence: name of the loss.
        number: of the round, from 1.
        first: step of the run at which the round begins.
        steps: of the round.
    """
    loop = text.loop
    half = loop.batch // 2
    joined = join_states([states, text.states(number, half * steps)])
    numbers = np.unique(joined.row[joined.of_side(TRAINING)])
    written = len(states.text.ends)
    key = f"{joined.text.digest} {objective.batches.digest()}"
    of_target = PositionBatches(numbers[numbers < written], loop.batch - half, loop.seed, key, TEXTS)
    of_draft = PositionBatches(numbers[numbers >= written], half, loop.seed, key, TEXTS)
    teacher: nn.Module = teacher_of(text.draft, text.target)
    return replace(
        objective,
        batches=MixedBatches(of_target, of_draft, first),
        loss=lambda batch: text_loss(text.draft, teacher, joined, batch.numpy(), divergence),
    )


def train_in_rounds(
    draft: PreTrainedModel,
    objective: Objective,
    rounds: int,
    loop: LoopSettings,
    state: Path,
    on_checkpoint: Callable[[Outcome], None],
) -> Outcome:
    """Train on the target's text and then in rounds, as parts of one run: one schedule, equally many tokens in each.

    Each part has a file of its own, from which the next begins. A part that has ended is not repeated, so that the
    draft of a killed run has the weights again with which it wrote, and finds its text.

    Args:
        draft: the model; changed in place.
        objective: which makes an objective of each round; without rounds it is all there is.
        rounds: number of rounds, at least 0.
        loop: how to train.
        state: file of the first part's state.
        on_checkpoint: called after each periodic checkpoint.

    Raises:
        FitError: as for `hidden_states`.
        TrainingError: as for `train`.
    """
    parts, begun, part = rounds + 1, None, objective
    total = steps_of(loop)
    outcome = Outcome(0, 0, 0.0, math.nan)
    for number in range(parts):
        path = state if not number else state.with_name(f"{state.stem}-on-policy-{number}{state.suffix}")
        if number:
            assert objective.round_of is not None
            last = -(-total * (number + 1) // parts)
            part = objective.round_of(number, outcome.steps, max(1, last - outcome.steps))
        ends_at = (number + 1) / parts
        outcome = train(draft, part.loss, part.batches, loop, path, on_checkpoint, ends_at=ends_at, begun=begun)
        begun = path
    return outcome


def steps_of(loop: LoopSettings) -> int:
    """Steps of a run that ends by tokens."""
    return max(1, math.ceil(loop.tokens / (loop.batch * loop.length)))


def describe_rounds(rounds: int, writing: TextSettings) -> str:
    """A line for a card on the rounds."""
    return (
        f"on-policy distillation in {rounds} round{'s' * (rounds > 1)}: after each of the first {rounds} of "
        f"{rounds + 1} equal parts of the training, the draft itself continued training prompts of all this text by at "
        f"most {writing.new_tokens} tokens, at temperature {TEMPERATURE:g}, and the target read that; in the part that "
        "followed, it was half of each batch"
    )
