"""Acceptance of a tree: literal transcriptions of the rules, brute force, and the known traps."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding import Pair, Sampling
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.medusa.decoder import MedusaDecoder, MedusaRound, TypicalMedusaDecoder
from specgym.decoding.decoders.medusa.trees import (
    CandidateTree,
    assumed_accuracies,
    cartesian,
    longest,
    matched,
    sparse,
    typical,
)
from tests.helpers.known_distributions import SAMPLINGS, conditional
from tests.helpers.small_medusa_heads import random_heads, scripted_heads
from tests.helpers.table_models import ReadableTable, TableModel

MakeModel = Callable[..., PreTrainedModel]

RAGGED = CandidateTree([(0,), (1,), (2,), (1, 0), (1, 1), (1, 1, 0), (1, 1, 0, 2)])
TREES = [RAGGED, cartesian([3, 2, 2]), cartesian([1, 1, 1, 1]), sparse(assumed_accuracies(4), 24), CandidateTree([])]


def every_path(tree: CandidateTree) -> list[list[int]]:
    """Paths from below the root to all nodes, and the empty path."""
    return [tree.tree.path(node)[1:] for node in range(len(tree) + 1)]


def transcribed(p: Sequence[float], token: int, epsilon: float, delta: float) -> bool:
    """The paper's criterion, word for word."""
    entropy = -sum(share * math.log(share) for share in p if share > 0)
    return p[token] > min(epsilon, delta * math.exp(-entropy))


def random_case(tree: CandidateTree, seed: int, vocabulary: int = 12) -> tuple[Tensor, Tensor]:
    """Distributions after each node, of every sharpness, and tokens; siblings differ."""
    generator = torch.Generator().manual_seed(seed)
    spread = 4 * torch.rand(len(tree) + 1, 1, generator=generator)
    p = (spread * torch.randn(len(tree) + 1, vocabulary, generator=generator)).softmax(-1)
    candidates = torch.rand(tree.heads, vocabulary, generator=generator).argsort(-1)[:, : tree.ranks]
    return p, tree.filled(torch.tensor([seed % vocabulary]), candidates)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.3, 1.0), (1.0, 2.0), (0.5, 0.0), (0.0, 2.0), (0.02, 2)])
def test_typical_acceptance_is_the_papers_formula(epsilon: float, delta: float) -> None:
    outcomes = set()
    for tree, seed in itertools.product(TREES[:-1], range(8)):
        p, tokens = random_case(tree, seed)
        p[seed % len(p), 3] = 0  # as where top-k leaves a token out; entropies have nothing of it
        p /= p.sum(-1, keepdim=True)
        passes, chances = typical(p, tokens, tree.parents_on(p.device), epsilon, delta)
        for node in range(1, len(tree) + 1):
            row, token = p[tree.tree.parents[node]].double().tolist(), int(tokens[node])
            assert bool(passes[node - 1]) == transcribed(row, token, epsilon, delta), (seed, node)
            assert float(chances[node - 1]) == pytest.approx(row[token])
            outcomes.add(bool(passes[node - 1]))
    assert outcomes == {True, False}


def test_the_threshold_is_strict_and_epsilon_or_the_entropy_whichever_is_lower() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    entropy = 1.5 * math.log(2)
    tree = CandidateTree([(0,), (1,), (0, 0)])
    tokens = torch.tensor([0, 0, 1, 0])

    def passed(epsilon: float, delta: float) -> list[bool]:
        return typical(p, tokens, tree.parents_on(p.device), epsilon, delta)[0].tolist()

    assert passed(0.25, 9.0) == [True, False, True]  # 0.25 is not above 0.25
    assert passed(0.2499, 9.0) == [True, True, True]
    assert passed(1.0, 0.24 * math.exp(entropy)) == [True, True, True]
    assert passed(1.0, 0.26 * math.exp(entropy)) == [True, False, True]
    assert passed(1.0, 1.0) == [True, False, False]  # certain is not above 1


@pytest.mark.parametrize("tree", TREES)
def test_the_longest_path_that_passes_wins_and_then_the_most_probable(tree: CandidateTree) -> None:
    rng = random.Random(len(tree))
    tied = 0
    for _ in range(100):
        share = rng.choice([0.3, 0.7, 0.95])
        passes = [float(rng.random() < share) for _ in range(len(tree))]
        chances = [rng.random() for _ in range(len(tree))]
        whole = [path for path in every_path(tree) if all(passes[node - 1] for node in path)]
        length = max(map(len, whole))
        among = [path for path in whole if len(path) == length]
        expected = max(among, key=lambda path: sum(math.log(chances[node - 1]) for node in path))
        assert longest(tree, passes, chances) == expected
        tied += len(among) > 1
    assert tied > 10 or tree.ranks < 2


def test_a_probable_first_token_does_not_outweigh_a_longer_path() -> None:
    tree = CandidateTree([(0,), (1,), (1, 0)])
    assert longest(tree, [1, 1, 1], [0.9, 0.1, 0.1]) == [2, 3]
    assert longest(tree, [1, 1, 0], [0.9, 0.1, 0.1]) == [1]
    assert longest(tree, [1, 0, 1], [0.9, 0.1, 0.1]) == [1]  # what hangs from a refused node does not count
    assert longest(tree, [0, 0, 1], [0.9, 0.1, 0.1]) == []
    assert longest(tree, [1, 1, 0], [0.0, 0.0, 0.0]) in ([1], [2])  # impossible ones are no error


def test_nothing_counts_behind_what_ends_a_text() -> None:
    tree = CandidateTree([(0,), (1,), (0, 0), (1, 0), (0, 0, 0)])
    passes, chances = [1.0] * 5, [0.9, 0.1, 0.9, 0.1, 0.9]
    assert longest(tree, passes, chances) == [1, 3, 5]
    assert longest(tree, passes, chances, ended={1}) == [2, 4]
    assert longest(tree, passes, chances, ended={1, 2}) == [1]
    assert longest(tree, passes, chances, ended={5}) == [1, 3, 5]


@pytest.mark.parametrize("tree", TREES)
def test_matched_is_the_longest_path_of_the_targets_own_choices(tree: CandidateTree) -> None:
    lengths = set()
    for seed in range(100):
        _, tokens = random_case(tree, seed, vocabulary=12)
        read = tokens.tolist()
        rng = random.Random(seed)
        # Often one of the children, so that long paths come up.
        choices = [rng.choice([read[child] for child in children] or [0]) for children in tree.children]
        choices = [choice if rng.random() < 0.8 else rng.randrange(12) for choice in choices]
        mine = [
            path
            for path in every_path(tree)
            if all(read[node] == choices[above] for above, node in itertools.pairwise([0, *path]))
        ]
        assert matched(tree, read, choices) == max(mine, key=len)
        lengths.add(len(max(mine, key=len)))
    assert lengths == set(range(tree.heads + 1)) or tree.heads > 3


def test_nothing_is_accepted_beyond_a_short_leaf_where_the_target_chooses_token_0() -> None:
    """Paths that are padded with token 0 to one length would match there."""
    leaf = 1  # of RAGGED, whose longest path has four nodes
    tokens = [5, 3, 4, 6, 0, 0, 0, 0]
    choices = [3, 0, 0, 0, 0, 0, 0, 0]
    assert matched(RAGGED, tokens, choices) == [leaf]
    p = torch.full((8, 8), 0.001)
    p[range(8), choices] = 1 - 0.007
    passes, chances = typical(p, torch.tensor(tokens), RAGGED.parents_on(p.device), 0.09, 0.3)
    assert passes.tolist() == [True, False, False, True, True, True, True]  # under a node that is refused
    assert longest(RAGGED, passes.tolist(), chances.tolist()) == [leaf]


@pytest.mark.parametrize("kind", [MedusaDecoder, TypicalMedusaDecoder])
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.5)], ids=["greedy", "sampled"])
def test_a_text_goes_on_with_the_targets_own_token_after_a_short_leaf(
    kind: type[MedusaDecoder], sampling: Sampling
) -> None:
    # Token 3 follows 5, token 0 follows 3, and 7 follows 0: what padding takes for a second 0 is none of the target's.
    following = {5: 3, 3: 0, 0: 7, 7: 5}
    table = torch.zeros(8, 8, 8)
    for token in range(8):
        table[:, token, following.get(token, 1)] = 60.0
    target = ReadableTable(TableModel(table))
    decoder = kind(Pair(target), scripted_heads(target, [[3, 4, 6], [0, 2, 1], [0, 2, 1], [0, 2, 1]]), tree=RAGGED)
    session = decoder.start([1, 5], max_new_tokens=20, sampling=sampling, seed=0)
    round_ = session.step()
    assert round_.tokens == (3, 0)
    assert round_.accepted == 1
    while not session.finished:
        session.step()
    assert session.tokens == ([3, 0, 7, 5] * 5)[:20]


@pytest.mark.parametrize("seed", range(2))
def test_typical_acceptance_at_temperature_0_is_greedy_decoding(make_model: MakeModel, seed: int) -> None:
    pair = Pair(make_model("llama", vocabulary=12, seed=seed))
    decoder = TypicalMedusaDecoder(pair, random_heads(pair.target.model, spread=0.05))
    expected = AutoregressiveDecoder(pair).generate([1, 2, 3], max_new_tokens=40).tokens
    for knobs in ({}, {"epsilon": 0.0, "delta": 0.0}, {"epsilon": 1.0, "delta": 2.0, "tree_size": 40}):
        generation = decoder.generate([1, 2, 3], max_new_tokens=40, knobs=knobs)
        assert generation.tokens == expected
        assert generation.divergence == 0
        assert (
            0
            < sum(round_.accepted for round_ in generation.rounds)
            < sum(round_.drafted for round_ in generation.rounds)
        )


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_the_reported_divergence_is_what_emitted_candidates_lacked_to_certainty(
    make_model: MakeModel, sampling: Sampling
) -> None:
    model = make_model("llama", vocabulary=24)
    model.generation_config.eos_token_id = [3, 4, 5]
    pair = Pair(model)
    decoder = TypicalMedusaDecoder(pair, random_heads(model, spread=0.05))
    knobs = {"epsilon": 0.02, "delta": 0.1, "tree_size": 32}
    accepted, cut = 0, 0
    for seed in range(6):
        session = decoder.start([1, 2, 7, 8], max_new_tokens=30, sampling=sampling, seed=seed)
        while not session.finished:
            context = list(session.context)
            round_ = session.step(knobs)
            assert isinstance(round_, MedusaRound)
            lacking = 0.0
            for token in round_.tokens[: round_.accepted]:
                p = conditional(pair.target, sampling, context).tolist()
                assert transcribed(p, token, knobs["epsilon"], knobs["delta"])
                lacking += 1 - p[token]
                context.append(token)
            assert round_.divergence == pytest.approx(lacking, abs=1e-4)
            accepted += round_.accepted
            cut += round_.accepted == len(round_.tokens)  # by a token that ends the text, within the path
    model.generation_config.eos_token_id = None
    assert accepted > 10
    assert cut > 0


def test_strict_thresholds_accept_only_what_stands_out(make_model: MakeModel) -> None:
    pair = Pair(make_model("llama", vocabulary=24))
    decoder = TypicalMedusaDecoder(pair, random_heads(pair.target.model, spread=0.05))
    accepted = {}
    for name, knobs in {"loose": {"epsilon": 0.0}, "usual": {}, "strict": {"epsilon": 1.0, "delta": 2.0}}.items():
        accepted[name] = 0
        for seed in range(6):
            session = decoder.start([1, 2, 7], max_new_tokens=30, sampling=Sampling(1.2), seed=seed)
            while not session.finished:
                context = list(session.context)
                round_ = session.step(knobs)
                accepted[name] += round_.accepted
                for token in round_.tokens[: round_.accepted] if name == "strict" else ():
                    p = conditional(pair.target, Sampling(1.2), context).tolist()
                    entropy = -sum(share * math.log(share) for share in p if share)
                    # More than twice as probable as a token of as many equally likely ones.
                    assert p[token] > 2 * math.exp(-entropy)
                    assert entropy > math.log(2)
                    context.append(token)
    assert accepted["loose"] > accepted["usual"] > accepted["strict"] > 0


def test_the_exact_decoder_reports_no_divergence(make_model: MakeModel) -> None:
    pair = Pair(make_model("llama", vocabulary=12))
    decoder = MedusaDecoder(pair, random_heads(pair.target.model, spread=0.05))
    for sampling in (*SAMPLINGS.values(), Sampling(0.0)):
        generation = decoder.generate([1, 2, 3], max_new_tokens=40, sampling=sampling, seed=0)
        assert generation.divergence == 0
        assert sum(round_.accepted for round_ in generation.rounds) > 0
