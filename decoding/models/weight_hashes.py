"""Digests of models, drafts, heads and guidance, by which a recording names what it was made with."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ..decoders.draft_tree.draft_guidance import Guidance
from ..decoders.medusa import MedusaHeads
from ..drafts.drafter import Drafter, ModelDrafter
from ..drafts.ngram import NGramDrafter
from ..drafts.prompt_lookup import PromptLookupDrafter


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights, as float32, whatever device they are on; 64 hex digits."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32) if tensor.is_floating_point() else tensor.detach().cpu()
        state.update(values.contiguous().numpy().tobytes())
    return state.hexdigest()


def heads_digest(heads: MedusaHeads) -> str:
    """SHA-256 over all that a target's Medusa heads are: weights, tokens, and accuracies, by which trees are made."""
    known = f"{heads.shape} {heads.accuracies} {weights_digest(heads)}"
    return hashlib.sha256(known.encode()).hexdigest()


def guidance_digest(guidance: Guidance) -> str:
    """SHA-256 over what stands beside the draft of a tree: alignment, its weight, and predictor; empty for nothing."""
    if guidance.alignment is None:  # which all else reads
        return ""
    known = f"{weights_digest(guidance.alignment)} {guidance.weight}"
    if guidance.predictor is not None:
        known += f" {guidance.predictor.shape} {weights_digest(guidance.predictor)}"
    return hashlib.sha256(known.encode()).hexdigest()


def draft_digest(draft: Drafter) -> str:
    """SHA-256 of what a draft's proposals depend on; of drafts from elsewhere only the name is known."""
    if isinstance(draft, ModelDrafter):
        return weights_digest(draft.model.model)
    if isinstance(draft, NGramDrafter):
        return draft.digest()
    if isinstance(draft, PromptLookupDrafter):
        return hashlib.sha256(f"prompt-lookup {draft.longest}".encode()).hexdigest()
    return hashlib.sha256(draft.name.encode()).hexdigest()
