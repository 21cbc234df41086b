"""What a target decides on a draft's candidates along its own text: the examples of acceptance prediction.

Along accepted tokens a draft's state is the one that it has where it reads the target's own text, so both models read
that text once, and every position is taken as a place where a tree hangs its nodes. What is missing then is that deep
nodes are met where the text is easy. So every position is also taken as the root of a tree, and one further on counts
as a node at depth d only if the draft had the d - 1 tokens between among its candidates and the target accepted them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..decoders.draft_tree import AffineAlignment, NodeFeatures, proposals
from ..decoders.draft_tree.predictor import Label
from ..models.output_head import OutputLayer
from .paired_states import PairedStates

_LOGITS_AT_A_TIME = 2**23


@dataclass(frozen=True)
class Verifications:
    """Candidates at some positions, and every depth at which a tree would have met each.

    Attributes:
        states: of both models.
        alignment: of the draft's states.
        at: numbers of the positions among those of ``states``, shape (positions,), int64, ascending.
        tokens: the candidates, shape (positions, children), int64.
        log_probability: of each under the draft at temperature 1, in nats, likewise, float32.
        entropy: of the draft, in nats, shape (positions,), float32.
        aligned_log_probability: of each candidate by the target's output layer on the aligned state, shape
            (positions, children), float32.
        labels: whether, or how likely, the target accepts each, from 0 to 1, likewise.
        position: of each node its place in ``at``, shape (nodes,), int64.
        depth: of the candidates of each node, 1 where it is the root, shape (nodes,), int64.
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
        """What is known of the candidates of some nodes, and their labels.

        Args:
            nodes: their numbers, shape (m,), int64.

        Returns:
            Features of m times children candidates, those of a node together, and the labels, shape (m * children,).
        """
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
        states: of both models.
        at: numbers of the positions, those of whole texts, shape (positions,), int64, ascending.
        alignment: of the draft's states.
        draft_output: the draft's output layer.
        target_output: the target's.
        label: what it means to accept, see `PredictorShape`. For ``ratio`` the candidates are drawn from the draft, for
            the others they are its likeliest tokens.
        children: candidates of a position, at most the vocabulary.
        deepest: depth of the deepest nodes.
        temperature: of both models' sampling, for the labels ``probability`` and ``ratio``.
        seed: of the candidates that are drawn.
    """
    count, device = len(at), alignment.weight.device
    tokens = torch.empty(count, children, dtype=torch.int64)
    own, aligned, labels = (torch.empty(count, children) for _ in range(3))
    entropy, followed = torch.empty(count), torch.empty(count, dtype=torch.bool)
    generator = torch.Generator(device).manual_seed(seed)
    written = torch.from_numpy(states.written[at].astype(np.int64))
    step = max(1, _LOGITS_AT_A_TIME // len(target_output.weight))
    for start in tqdm(range(0, count, step), unit="batch", mininterval=5.0, desc="verifications"):
        place = slice(start, start + step)
        part = at[place]
        hidden = states.of_draft(part).to(device)
        drafted = proposals(hidden, draft_output)
        wanted = proposals(states.of_target(part).to(device), target_output)
        log_q = drafted.log_softmax(-1)
        if label == "ratio":
            warped = (drafted / temperature).softmax(-1)
            found = warped.multinomial(children, replacement=True, generator=generator)
            given = (wanted / temperature).softmax(-1).gather(1, found)
            judged = (given / warped.gather(1, found).clamp(min=1e-30)).clamp(max=1)
        else:
            found = log_q.topk(children, dim=-1).indices
            if label == "match":
                judged = (found == wanted.argmax(-1, keepdim=True)).float()
            else:
                judged = (wanted / temperature).softmax(-1).gather(1, found)
        tokens[place], labels[place] = found.cpu(), judged.cpu()
        own[place] = log_q.gather(1, found).cpu()
        entropy[place] = -(log_q.exp() * log_q).nan_to_num().sum(-1).cpu()  # 0 times -inf is no entropy
        aligned[place] = proposals(alignment(hidden), target_output).log_softmax(-1).gather(1, found).cpu()
        # What is not the target's likeliest token follows nothing that a greedy verifier accepts.
        right = (found.cpu() == written[place, None]) & ((judged.cpu() > 0) if label == "match" else torch.tensor(True))
        followed[place] = right.any(-1)
    position, depth = met(followed.numpy(), states.row[at], deepest)
    return Verifications(states, alignment, at, tokens, own, entropy, aligned, labels, position, depth)


def met(followed: np.ndarray, row: np.ndarray, deepest: int) -> tuple[np.ndarray, np.ndarray]:
    """Every depth at which trees meet a position, if each position is the root of one.

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
