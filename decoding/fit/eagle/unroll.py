"""The training-time test of EAGLE-3 (arXiv 2503.01840): a head unrolled along its own states, at all positions at once.

Step 0 reads the target's features. In step k, the head at position m has drafted the k positions before it (its own
included) itself: it reads its state of step k - 1 at position m - 1 in place of a feature, and its attention sees the
keys of step 0 up to position m - k, then those of step 1 at m - k + 1, of step 2 after it, up to its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...drafts.eagle.head import EagleHead
from .features import TextBatch

DECAY = 0.8
"""Weight of a step's loss relative to that of the step before it."""


def unrolled(head: EagleHead, embedding: Tensor, feature: Tensor, steps: int) -> list[Tensor]:
    """Hidden states of a head at all positions, by the number of tokens that it has drafted before.

    Args:
        head: attached to its target.
        embedding: of the token after each position, shape (n, m, h).
        feature: of each position, likewise.
        steps: to unroll, at least 1.

    Returns:
        For each step k, shape (n, m, h); the first k positions have no meaning.
    """
    layer, shape, count = head.midlayer, head.shape, embedding.shape[1]
    rotation, group = head.rotation(0, count), shape.heads // shape.kv_heads
    place = torch.arange(count, device=embedding.device)
    behind = place[:, None] - place
    results, drafted_keys, drafted_values = list[Tensor](), list[Tensor](), list[Tensor]()
    first_keys = first_values = torch.empty(0)
    for step in range(steps):
        queries, keys, values, residual = layer.enter(embedding, feature, rotation)
        keys, values = (part.repeat_interleave(group, -3) for part in (keys, values))
        if not step:
            first_keys, first_values = keys, values
            attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            drafted_keys.append(keys)
            drafted_values.append(values)
            scale = shape.head_dim**-0.5
            scores = (queries * scale) @ first_keys.mT
            scores = scores.masked_fill(behind < step, torch.finfo(scores.dtype).min)
            shifted = [_later(part, step - number) for number, part in enumerate(drafted_keys, 1)]
            beside = [(queries * scale * part).sum(-1, keepdim=True) for part in shifted]
            weights = torch.cat([scores, *beside], -1).float().softmax(-1).to(values.dtype)
            attended = weights[..., :count] @ first_values
            for number, part in enumerate(drafted_values, 1):
                share = weights[..., count + number - 1 : count + number]
                attended = attended + share * _later(part, step - number)
        results.append(layer.leave(residual, attended))
        feature = _later(results[-1], 1)
    return results


def unrolled_loss(head: EagleHead, teacher: nn.Module, batch: TextBatch, steps: int) -> Tensor:
    """Sum over steps k of 0.8^k times the mean KL divergence from the target's distribution, in nats; a scalar.

    The distributions are those over the tokens that the head can propose.

    Args:
        head: to be trained.
        teacher: output layer of the target for these tokens, shapes (..., width) to (..., outputs).
        batch: texts of the target.
        steps: to unroll.
    """
    hidden = states_of(head, batch, steps)
    with torch.no_grad():
        first = batch.counted(0)
        p = teacher(batch.last[:, 1:][first].to(head.norm.weight.dtype)).float().softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
    total = torch.zeros((), device=p.device)
    for step, states in enumerate(hidden):
        counted = batch.counted(step)
        if not bool(counted.any()):
            break
        chosen = counted[first]
        crossed = functional.cross_entropy(head.scores(states[counted]).float(), p[chosen])
        total = total + DECAY**step * (crossed - entropy[chosen].mean())
    return total


def states_of(head: EagleHead, batch: TextBatch, steps: int) -> list[Tensor]:
    """`unrolled` along texts: at each position whose next token is known, shape (n, width - 1, h)."""
    dtype = head.norm.weight.dtype
    with torch.no_grad():
        embedding = head.embeddings(batch.tokens[:, 1:]).to(dtype)
    return unrolled(head, embedding, head.fc(batch.states[:, :-1].to(dtype)), steps)


def _later(states: Tensor, count: int) -> Tensor:
    """States moved so many positions on, along the last dimension but one; zeros come in."""
    if not count:
        return states
    return functional.pad(states, (0, 0, count, 0))[..., : states.shape[-2], :]
