"""The alignments and predictors that ship: better guesses, and better forecasts, than the draft alone; better trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.draft_tree.alignment import proposals
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder
from specgym.decoding.decoders.draft_tree.files import usual_acceptance, usual_alignment
from specgym.decoding.decoders.draft_tree.predictor import NodeFeatures
from specgym.decoding.loading.pair import load_pair
from specgym.decoding.models.output_layer import output_layer
from specgym.decoding.prompts import load_prompts

CHILDREN = 5
NEW = 32


@pytest.mark.parametrize(
    ("name", "alone", "share"),
    # Drafts narrower than the target: the alignment knows more only together with the draft's own output layer.
    [
        ("tiny", True, 0.8),
        ("tiny-10m-2l", True, 0.8),
        ("tiny-10m-xs", False, 0.9),
        ("tiny-10m-3m", False, 0.8),
        ("tiny-3m-1l", True, 0.8),
    ],
)
@torch.no_grad()
def test_what_ships_knows_more_of_the_target_than_the_draft_does_where_the_target_writes_greedily(
    name: str, alone: bool, share: float
) -> None:
    """The predictor's squared errors are less than this share of the draft's."""
    pair: Any = load_pair(name)
    draft, target = pair.draft.model, pair.target
    alignment = usual_alignment(draft, target)
    assert alignment is not None
    predictor = usual_acceptance(draft, target, alignment)
    assert predictor is not None
    assert predictor.shape.label == "match"
    own_right = aligned_right = mixed_right = positions = 0
    errors = torch.zeros(2)
    for domain in ("prose", "code", "definitions"):
        prompts = [pair.encode(text)[:64] for text in load_prompts(domain).test[:8]]
        generations = AutoregressiveDecoder(pair).generate_batch(prompts, max_new_tokens=NEW)
        for prompt, generation in zip(prompts, generations, strict=True):
            written = generation.tokens
            tokens = torch.tensor([*prompt, *written[:-1]])
            read = draft.fresh().forward(tokens, last=len(written), hidden=True)
            likeliest = torch.tensor(written).unsqueeze(-1)
            aligned = alignment(read.hidden[-len(written) :])
            guess = proposals(aligned, output_layer(target.model)).log_softmax(-1)
            own_right += int((read.scores.argmax(-1) == likeliest[:, 0]).sum())
            aligned_right += int((guess.argmax(-1) == likeliest[:, 0]).sum())
            mixed = read.scores.softmax(-1) + guess.exp()  # half draft, half aligned
            mixed_right += int((mixed.argmax(-1) == likeliest[:, 0]).sum())
            positions += len(written)
            log_q = read.scores.log_softmax(-1)
            result = log_q.topk(CHILDREN, dim=-1)
            features = NodeFeatures(
                hidden=aligned.repeat_interleave(CHILDREN, dim=0),
                log_probability=result.values.flatten(),
                entropy=-(log_q.exp() * log_q).sum(-1).repeat_interleave(CHILDREN),
                depth=torch.ones(CHILDREN * len(written)),
                aligned_log_probability=guess.gather(1, result.indices).flatten(),
            )
            accepted = (result.indices == likeliest).flatten().float()
            for which, forecast in enumerate((result.values.exp().flatten(), predictor.predict(features))):
                errors[which] += (forecast - accepted).square().sum()
    assert positions > 500
    assert (aligned_right if alone else mixed_right) > own_right
    assert errors[1] < share * errors[0]


def test_pruning_by_the_predictor_spares_thirty_per_cent_of_a_large_tree_for_three_per_cent_of_what_is_accepted() -> (
    None
):
    pair = load_pair("tiny-3m-1l")
    decoder = DraftTreeDecoder.for_pair(pair)
    prompts = [pair.encode(text)[:64] for domain in ("prose", "code") for text in load_prompts(domain).test[:4]]
    verified, accepted = [], []
    for threshold in (0.0, 0.015):
        knobs = {"node_budget": 40, "min_acceptance_prob": threshold}
        rounds = [
            round_ for prompt in prompts for round_ in decoder.generate(prompt, max_new_tokens=NEW, knobs=knobs).rounds
        ]
        verified.append(sum(round_.drafted for round_ in rounds) / len(rounds))
        accepted.append(sum(round_.accepted for round_ in rounds) / len(rounds))
    assert verified[1] <= 0.7 * verified[0]
    assert accepted[1] >= 0.97 * accepted[0]
