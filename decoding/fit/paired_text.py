"""What the commands have in common that learn how a draft and its target go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..drafts.drafter import ModelDrafter
from ..loading.pair import Pair, load_pair
from ..models.language_model import LanguageModel
from .distilled_text import check_text_settings, distil_text
from .errors import FitError
from .loop import LoopSettings, device_of
from .own_text_settings import OwnTextSettings, check_folders, check_least, check_optimiser, dtype_of
from .paired_states import PairedStates, paired_states
from .position_batches import POSITIONS, require_batch
from .prompt_windows import JUDGING, SPEED, TRAINING, cut_prompts

REPORTED = SPEED
"""The side of the text that nothing is chosen by, so that reports are on it alone."""


def pair_loop(learning_rate: float) -> LoopSettings:
    """How small networks beside a pair are trained by default."""
    return LoopSettings(
        tokens=512_000,
        batch=2,
        length=256,
        learning_rate=learning_rate,
        optimiser="adamw",
        weight_decay=0.0,
        bfloat16=False,
    )


@dataclass(kw_only=True)
class PairSettings(OwnTextSettings):
    """Settings of the alignment and the acceptance command."""

    draft: str
    """The draft: a folder, a hub id, or a model that the package ships; it numbers tokens as the target does."""


@dataclass(frozen=True)
class PairedText:
    """A draft, its target, and what both make of the target's own text.

    Attributes:
        draft: the draft.
        target: the target.
        states: of both along the text.
        sources: lines that say where the prompts come from.
    """

    draft: LanguageModel
    target: LanguageModel
    states: PairedStates
    sources: list[str]


def check_pair_settings(settings: PairSettings, loop: LoopSettings, out: Path, least: dict[str, int]) -> None:
    """Refuse settings that are out of range, before anything is loaded.

    Args:
        settings: to be checked.
        loop: how to train.
        out: folder to be written.
        least: the least values of the command's own settings, by name.

    Raises:
        FitError: one is out of range, or ``out`` is a folder that is read.
    """
    check_least(settings, least)
    check_optimiser(loop, "this is")
    check_folders(settings.target, out)
    check_folders(settings.draft, out)


def open_pair(settings: PairSettings, loop: LoopSettings) -> tuple[Pair, LanguageModel]:
    """Target and draft, whose weights get no gradient, and of the draft the model.

    Raises:
        ModelNotFoundError, UnknownPairError: there are no such models.
        VocabularyMismatchError: they do not number the same tokens.
        FitError: the draft is no model.
    """
    if loop.threads:
        torch.set_num_threads(loop.threads)
    name = f"{settings.target}+{settings.draft}"
    # Weights are left as they are: what is prepacked gives other hidden states, if only a little.
    pair = load_pair(name, dtype=dtype_of(settings, loop, frozen=True), device=device_of(loop), prepack=False)
    if not isinstance(pair.draft, ModelDrafter):
        raise FitError(f"--draft {settings.draft} is no model, so it has no hidden states: give one that is")
    for model in (pair.draft.model, pair.target):
        model.model.requires_grad_(False)
    return pair, pair.draft.model


def read_text(settings: PairSettings, loop: LoopSettings, pair: Pair, draft: LanguageModel) -> PairedText:
    """Let the target write, and both models read that; or open what an earlier call kept.

    The models are called from here on as files that are passed on should call them, without the places where they are.

    Args:
        settings: which text.
        loop: says the seed, and where text is kept.
        pair: as `open_pair` gives it.
        draft: likewise.

    Raises:
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
    """
    own_text, target = settings.own_text, pair.target
    assert pair.tokenizer is not None  # it was loaded with the target
    for model in (draft, target):
        check_text_settings(own_text, model.model, 1, "pairs of states")
    prompts = cut_prompts(
        pair.tokenizer, settings.corpus, settings.text, own_text.texts, own_text.prompt_tokens, loop.seed
    )
    most = own_text.new_tokens * int((prompts.side == TRAINING).sum())  # fewer where the target ends a text
    require_batch(most, loop.batch * loop.length, POSITIONS)
    text = distil_text(target.model, pair.eos_token_ids, prompts, own_text, loop.seed, loop.work)
    states = paired_states(draft.model, target.model, text)
    for side in (JUDGING, REPORTED):
        if not len(states.of_side(side)):
            raise FitError("the target ended every text that was kept apart at once: give more --texts")
    for model, given in ((draft, settings.draft), (target, settings.target)):
        if Path(given).expanduser().exists():
            model.name = Path(given).name
    return PairedText(draft, target, states, prompts.sources)


def spread_over(positions: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of some numbers, evenly spread; shape (at most count,), int64."""
    return positions[np.linspace(0, len(positions) - 1, min(len(positions), count)).astype(np.int64)]
