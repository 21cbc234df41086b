"""Load a draft and its target, and read the target's text with both of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...drafts.drafter import ModelDrafter
from ...errors import FitError
from ...loading.pair import Pair, load_pair
from ...models.language_model import LanguageModel
from ..settings import PairSettings, check_out, check_own_text, dtype_of
from ..text.prompts import JUDGING, SPEED
from ..text.states import PairedStates, paired_states
from ..text.target_text import check_text_settings, own_text

REPORTED = SPEED
"""Side of the text that nothing is chosen by, on which alone reports are based."""


@dataclass(frozen=True)
class PairText:
    """A draft, its target, and the states of both along the target's text.

    Attributes:
        draft: the draft.
        target: the target.
        states: their states.
        sources: lines on the origin of the text.
    """

    draft: LanguageModel
    target: LanguageModel
    states: PairedStates
    sources: list[str]


def open_pair(settings: PairSettings, **least: int) -> tuple[Pair, LanguageModel]:
    """Check settings, then load target and draft without gradients for their weights; ``least`` as in `check_own_text`.

    Raises:
        ModelNotFoundError, UnknownPairError: there are no such models.
        VocabularyMismatchError: they do not number the same tokens.
        FitError: the draft is no model, a setting is out of range, or the folder to write is one that is read.
    """
    check_own_text(settings, "these networks", **least)
    check_out(settings.out, settings.target, settings.draft)
    settings.loop.set_threads()
    name, dtype = f"{settings.target}+{settings.draft}", dtype_of(settings, frozen=True)
    # Weights are left as they are: prepacking changes hidden states, if only a little.
    pair = load_pair(name, dtype=dtype, device=settings.loop.torch_device(), prepack=False)
    if not isinstance(pair.draft, ModelDrafter):
        raise FitError(f"--draft {settings.draft} is no model, so it has no hidden states: give one that is")
    for model in (pair.draft.model, pair.target):
        model.model.requires_grad_(False)
    return pair, pair.draft.model


def read_text(settings: PairSettings, pair: Pair, draft: LanguageModel) -> PairText:
    """Let the target write, and both models read that; or read what an earlier call stored.

    The models lose the folders from their names, since cards and other files that are passed on contain the names.

    Raises:
        FileNotFoundError: there is no text.
        FitError: a setting is out of range, or there is too little text.
    """
    target = pair.target
    for model, place in ((draft, settings.draft), (target, settings.target)):
        if Path(place).expanduser().exists():
            model.name = Path(place).name
    check_text_settings(settings.own_text, draft.model, 1)
    text, prompts = own_text(settings, pair, target.name, 1)
    states = paired_states(draft.model, target.model, text)
    for side in (JUDGING, REPORTED):
        if not len(states.of_side(side)):
            raise FitError("the target ended every held-out text at once: give more --texts")
    return PairText(draft, target, states, prompts.sources)
