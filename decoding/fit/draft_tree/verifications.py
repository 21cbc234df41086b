"""Verdicts of a target on a draft's candidates along its own text: the training data of acceptance prediction.

Along accepted tokens a draft's state equals the one that it has where it reads the target's text, so both models read
that text once, and a tree's children are verified at every position. Deep nodes of real trees are reached where the
text is easy. So every position is also taken as the root of a tree, and a position further on counts as a node at depth
d only if the draft had the d - 1 tokens between among its candidates and the target accepted them.

Load a draft and its target, and read the target's text with both of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ...decoders.draft_tree.alignment import AffineAlignment, proposals
from ...decoders.draft_tree.predictor import Label, NodeFeatures
from ...drafts.drafter import ModelDrafter
from ...drafts.translated import TranslatedModel
from ...errors import FitError
from ...loading.pair import Pair, load_pair
from ...models.language_model import LanguageModel
from ...models.output_layer import OutputLayer
from ..settings import PairSettings, check_out, check_own_text, dtype_of, require_least
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
        VocabularyMismatchError: the draft's tokens cannot be told in terms of the target's.
        FitError: the draft is no model or has another tokenizer, a setting is out of range, or the folder to write is
            one that is read.
    """
    check_own_text(settings, "these networks", **least)
    require_least(settings.loop, length=1)
    check_out(settings.out, settings.target, settings.draft)
    settings.loop.set_threads()
    name, dtype = f"{settings.target}+{settings.draft}", dtype_of(settings, frozen=True)
    # Weights are left as they are: prepacking changes hidden states, if only a little.
    pair = load_pair(name, dtype=dtype, device=settings.loop.torch_device(), prepack=False)
    if not isinstance(pair.draft, ModelDrafter):
        raise FitError(f"--draft {settings.draft} is no model, so it has no hidden states: give one that is")
    draft = pair.draft.model
    if isinstance(draft, TranslatedModel) and not draft.translation.complete:
        raise FitError(
            f"--draft {settings.draft} lacks tokens of --target {settings.target} or numbers them otherwise, and these "
            "networks compare states of both at the same tokens: give a draft with the target's tokenizer, or draw "
            "trees without them"
        )
    for model in (draft, pair.target):
        model.model.requires_grad_(False)
    return pair, draft


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


def drafted_scores(hidden: Tensor, draft_output: OutputLayer, target_output: OutputLayer) -> Tensor:
    """Scores of a draft's output layer, whose padding may differ from the target's.

    Args:
        hidden: states of the draft, shape (n, draft width).
        draft_output: the draft's output layer.
        target_output: the target's.

    Returns:
        Logits, shape (n, the target's rows), float32; the least number for rows that the draft has not.
    """
    scores = proposals(hidden, draft_output)
    missing = len(target_output.weight) - scores.shape[-1]  # where negative, the last rows are cut
    return functional.pad(scores, (0, missing), value=torch.finfo(scores.dtype).min)


_LOGITS_AT_A_TIME = 2**23


@dataclass(frozen=True)
class Verifications:
    """Candidates at some positions, and every depth at which a tree would have met each.

    Attributes:
        states: states of both models.
        alignment: map of the draft's states.
        at: numbers of the positions among those of ``states``, shape (positions,), int64, ascending.
        tokens: the candidates, shape (positions, children), int64.
        log_probability: log-probability of each under the draft at temperature 1, in nats, likewise, float32.
        entropy: entropy of the draft, in nats, shape (positions,), float32.
        aligned_log_probability: log-probability of each candidate by the target's output layer on the aligned state,
            shape (positions, children), float32.
        labels: whether, or how likely, the target accepts each, from 0 to 1, likewise.
        position: place of each node in ``at``, shape (nodes,), int64.
        depth: depth of each node's candidates, 1 for the root, shape (nodes,), int64.
    """

    states: PairedStates
    alignment: AffineAlignment
    at: np.ndarray
    tokens: Tensor
    log_probability: Tensor
    entropy: Tensor
    aligned_log_probability: Tensor
    labels: Tensor
    position: np.ndarray
    depth: np.ndarray

    def of_side(self, side: int) -> np.ndarray:
        """Numbers of the nodes in texts of one side, shape (m,), int64, ascending."""
        return np.flatnonzero(self.states.text.side[self.states.row[self.at[self.position]]] == side)

    def examples(self, nodes: np.ndarray) -> tuple[NodeFeatures, Tensor]:
        """Features of m times children candidates of m nodes, those of a node together, and their labels."""
        position, children = self.position[nodes], self.tokens.shape[1]
        with torch.no_grad():
            hidden = self.alignment(self.states.of_draft(self.at[position]).to(self.alignment.weight.device))
        chosen = torch.from_numpy(position)
        features = NodeFeatures(
            hidden=hidden.repeat_interleave(children, dim=0),
            log_probability=self.log_probability[chosen].flatten().to(hidden.device),
            entropy=self.entropy[chosen].repeat_interleave(children).to(hidden.device),
            depth=torch.from_numpy(self.depth[nodes]).repeat_interleave(children).to(hidden.device),
            aligned_log_probability=self.aligned_log_probability[chosen].flatten().to(hidden.device),
        )
        return features, self.labels[chosen].flatten().to(hidden.device)


@torch.no_grad()
def verifications(
    states: PairedStates,
    at: np.ndarray,
    alignment: AffineAlignment,
    draft_output: OutputLayer,
    target_output: OutputLayer,
    *,
    label: Label,
    children: int,
    deepest: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Verifications:
    """Replay the drafting and verification of candidates.

    Args:
        states: states of both models.
        at: numbers of the positions, those of whole texts, shape (positions,), int64, ascending.
        alignment: map of the draft's states.
        draft_output: the draft's output layer.
        target_output: the target's.
        label: meaning of acceptance, see `PredictorShape`. For ``ratio`` the candidates are drawn from the draft, for
            the others they are its likeliest tokens.
        children: candidates of a position, at most the vocabulary.
        deepest: depth of the deepest nodes.
        temperature: temperature of both models' sampling, for the labels ``probability`` and ``ratio``.
        seed: seed of the candidates that are drawn.
    """
    count, device = len(at), alignment.weight.device
    tokens = torch.empty(count, children, dtype=torch.int64)
    drafted_log, aligned, labels = (torch.empty(count, children) for _ in range(3))
    entropy, followed = torch.empty(count), torch.empty(count, dtype=torch.bool)
    generator = torch.Generator(device).manual_seed(seed)
    written = torch.from_numpy(states.written[at].astype(np.int64))
    step = max(1, _LOGITS_AT_A_TIME // len(target_output.weight))
    for start in tqdm(range(0, count, step), unit="batch", mininterval=5.0, desc="verifications"):
        place = slice(start, start + step)
        part = at[place]
        hidden = states.of_draft(part).to(device)
        drafted = drafted_scores(hidden, draft_output, target_output)
        expected = proposals(states.of_target(part).to(device), target_output)
        log_q = drafted.log_softmax(-1)
        if label == "ratio":
            warped = (drafted / temperature).softmax(-1)
            candidates = warped.multinomial(children, replacement=True, generator=generator)
            likelihood = (expected / temperature).softmax(-1).gather(1, candidates)
            judged = (likelihood / warped.gather(1, candidates).clamp(min=1e-30)).clamp(max=1)
        else:
            candidates = log_q.topk(children, dim=-1).indices
            if label == "match":
                judged = (candidates == expected.argmax(-1, keepdim=True)).float()
            else:
                judged = (expected / temperature).softmax(-1).gather(1, candidates)
        tokens[place], labels[place] = candidates.cpu(), judged.cpu()
        drafted_log[place] = log_q.gather(1, candidates).cpu()
        entropy[place] = -(log_q.exp() * log_q).nan_to_num().sum(-1).cpu()  # 0 times -inf is no entropy
        aligned[place] = proposals(alignment(hidden), target_output).log_softmax(-1).gather(1, candidates).cpu()
        # What is not the target's likeliest token follows nothing that a greedy verifier accepts.
        right = candidates.cpu() == written[place, None]
        if label == "match":
            right &= judged.cpu() > 0
        followed[place] = right.any(-1)
    position, depth = met(followed.numpy(), states.row[at], deepest)
    return Verifications(states, alignment, at, tokens, drafted_log, entropy, aligned, labels, position, depth)


def met(followed: np.ndarray, row: np.ndarray, deepest: int) -> tuple[np.ndarray, np.ndarray]:
    """Every depth at which trees meet a position, if every position is the root of a tree.

    Args:
        followed: whether the token written from each position was a candidate there that the target accepts, shape
            (positions,), bool.
        row: the text of each position, shape (positions,), int64; those of one text stand together, in order.
        deepest: depth of the deepest nodes.

    Returns:
        Positions and depths of nodes, each of shape (nodes,), int64; all those at depth 1 come first.
    """
    alive = np.ones(len(followed), dtype=bool)
    positions = [np.arange(len(followed))]
    for back in range(1, min(deepest, len(followed))):
        alive[:back] = False
        alive[back:] &= followed[:-back] & (row[back:] == row[:-back])
        positions.append(np.flatnonzero(alive))
    depths = [np.full(len(part), depth) for depth, part in enumerate(positions, 1)]
    return np.concatenate(positions), np.concatenate(depths)
