"""Decoding with a draft tree: a draft model grows a tree of candidates, which the target checks in one pass.

Trees of candidates: Miao et al., "SpecInfer" (arXiv 2305.09781); growing them best first by path probability: Li et
al., "EAGLE-2" (arXiv 2406.16858). Every way to verify that is offered here keeps the target's distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from ...decoder import Decoder, Session, synchronise
from ...drafts.drafter import ModelDrafter
from ...drafts.eagle.drafter import EagleDrafter
from ...drafts.eagle.tree import HeadInTrees
from ...errors import ArgumentError
from ...loading.pair import Pair, require_draft
from ...models.language_model import LanguageModel
from ...rounds import Round
from ...sampling import Sampling, draw
from .alignment import AffineAlignment
from .files import usual_acceptance, usual_alignment
from .grow_tree import EVERYTHING, DraftedTree, GrownTree, TreeDraft
from .predictor import AcceptancePredictor, Guidance
from .pruning import PRUNERS, RULES, AbsolutePruner, Likeliest, Randomness
from .traits import DEEPEST, LARGEST, MOST_CHILDREN, DraftTreeTraits

if TYPE_CHECKING:
    from ...latency.probe import CostProbe

DRAFT_SAMPLING = Sampling(0.8)

Known = TypeVar("Known")
Verify = Callable[[int], tuple[int, int]]
"""Verdict on a node: the place of its accepted child, or -1, and the token that follows it."""


@dataclass(frozen=True)
class DraftTreeRound(Round):
    """Result of a round with a draft tree. Seconds are parts of those of the round.

    `drafted` counts the candidates that were verified, `accepted` those of them that were emitted, and `draft_steps`
    the draft's passes, one a level.
    """

    pruned: int = 0
    """Candidates that were cut before verification, without those that would have followed them."""
    lost: int = 0
    """1 where the text went on with a token that pruning had cut, or from a node whose children it had."""
    alignment_seconds: float = 0.0
    prediction_seconds: float = 0.0
    pruning_seconds: float = 0.0
    forward_seconds: float = 0.0
    """Seconds of the target's pass; on a GPU, of starting it."""
    judge_seconds: float = 0.0
    """Choosing what to accept."""
    cache_seconds: float = 0.0
    """Keeping what was accepted in the caches of target and draft."""


class DraftTreeSession(Session["DraftTreeDecoder"]):
    """One prompt being generated with draft trees."""

    def _read_prompt(self, prompt: Sequence[int]) -> None:
        super()._read_prompt(prompt)
        decoder = self.decoder
        self._rule = decoder.rule
        self._pruner = PRUNERS[decoder.pruning]() if decoder.pruning is not None else None
        draft = decoder.draft.within(self.target) if isinstance(decoder.draft, HeadInTrees) else decoder.draft
        self.draft = TreeDraft(
            self.rules.draft(draft, self.target),
            prompt,
            decoder.rule,
            decoder.draft_sampling,
            decoder.guidance,
            self.generator,
            self.target.device,
        )

    def _round(self, knobs: Mapping[str, float]) -> Round:
        started = time.perf_counter()
        grown = self.draft.grow(
            self.context,
            width=int(knobs["max_candidates"]),
            depth=min(int(knobs["max_depth"]), self._room),
            budget=int(knobs["node_budget"]),
            pruner=self._pruner,
            threshold=knobs.get("min_acceptance_prob", 0.0),
        )
        tree = grown.drafted
        tokens = torch.tensor(tree.tokens, device=self.target.device)
        synchronise(self.target.device)
        drafted = time.perf_counter()

        scores = self.target.forward(tokens, tree.tree).scores
        passed = time.perf_counter()

        path, target_token = self._judge(scores, grown)
        judged = time.perf_counter()
        self.target.keep([0, *path])
        taken = self._emit([*(tree.tokens[node] for node in path), target_token])
        self.draft.keep([tree.rows[node] for node in path], len(self.context) - 1)
        ended = time.perf_counter()
        if self._pruner is not None:
            self._pruner.observe(len(tree) + tree.cut, tree.cut, taken, ended - started)
        # Where the text ended sooner, nothing was lost.
        lost = tree.lost[path[-1] if path else 0] if taken > len(path) else set[int]()
        return DraftTreeRound(
            tokens=tuple(self.tokens[-taken:]),
            drafted=len(tree),
            accepted=min(len(path), taken),
            divergence=0.0,
            draft_seconds=drafted - started,
            verify_seconds=ended - drafted,
            draft_steps=grown.steps,
            target_tokens=len(tree) + 1,
            pruned=tree.cut,
            lost=int(bool({target_token, EVERYTHING} & lost)),
            alignment_seconds=grown.seconds.alignment,
            prediction_seconds=grown.seconds.prediction,
            pruning_seconds=grown.seconds.pruning,
            forward_seconds=passed - drafted,
            judge_seconds=judged - passed,
            cache_seconds=ended - judged,
        )

    def _judge(self, scores: Tensor, grown: GrownTree) -> tuple[list[int], int]:
        """The accepted nodes below the root, from the top down, and the token that follows them."""
        tree = grown.drafted
        verify = self._matched(scores, tree) if self.sampling.greedy else self._by_the_rule(scores, grown)
        path, node = list[int](), 0
        while True:
            place, token = verify(node)
            if place < 0:
                return path, token
            node = tree.children[node][place]
            path.append(node)

    def _matched(self, scores: Tensor, tree: DraftedTree) -> Verify:
        # One wait for the device. (Floats hold any token: exact up to 2^24.)
        *choices, greatest = torch.cat([scores.argmax(-1).float(), scores.amax(-1).sum().reshape(1)]).tolist()
        self._refuse_broken(greatest)

        def verify(node: int) -> tuple[int, int]:
            tokens = [tree.tokens[child] for child in tree.children[node]]
            token = int(choices[node])
            return (tokens.index(token) if token in tokens else -1), token

        return verify

    def _by_the_rule(self, scores: Tensor, grown: GrownTree) -> Verify:
        tree, chance = grown.drafted, Randomness(self.generator, self._rng.random)
        self._refuse_broken(float(scores.amax(-1).sum()))

        def verify(node: int) -> tuple[int, int]:
            p = self.sampling.probabilities(scores[node])
            if not tree.children[node]:
                return -1, int(draw(p, self.generator))
            tokens = [tree.tokens[child] for child in tree.children[node]]
            q = grown.q[tree.rows[node]]
            return self._rule.verify(p, q, tokens, chance)

        return verify


class DraftTreeDecoder(DraftTreeTraits, Decoder[DraftTreeSession]):
    """Decoding with a tree of candidates from a draft model: the target's own text, whether greedy or sampled.

    Args:
        pair: a target with a model as its draft.
        rule: how children are chosen and verified: `likeliest`, `independent` or `distinct` (see `rules`).
        pruning: how hopeless branches are cut: `absolute`, `level`, `ratio` or `throughput` (see `pruning`); None for
            no pruning, and then there is no knob `min_acceptance_prob`.
        alignment: of the draft's hidden states to the target's.
        alignment_weight: share of the aligned state's proposals (the target's output layer on it) in the distribution
            that is drafted from, 0 to 1.
        predictor: says how likely a candidate is to be accepted, for growing and pruning; it reads aligned states.
            Without one the draft's own probability is taken for it.
        draft_sampling: warps the draft's distribution. Its temperature must not be 0: trees need second choices.
        max_candidates: upper end of the knob of this name.
        max_depth: likewise.
        max_nodes: upper end of the knob `node_budget`.

    Raises:
        ValueError: the pair has no draft or one that is no model, a name or number is out of range, or something that
            reads aligned states is given without an alignment.
        DraftTreeModelError: the alignment or the predictor was made for models of other widths.
    """

    session_class = DraftTreeSession

    def __init__(
        self,
        pair: Pair,
        rule: str = Likeliest.name,
        *,
        pruning: str | None = AbsolutePruner.name,
        alignment: AffineAlignment | None = None,
        alignment_weight: float = 0.0,
        predictor: AcceptancePredictor | None = None,
        draft_sampling: Sampling = DRAFT_SAMPLING,
        max_candidates: int = MOST_CHILDREN,
        max_depth: int = DEEPEST,
        max_nodes: int = LARGEST,
    ) -> None:
        super().__init__(pair)
        self.draft = _draft_model(pair, type(self).__name__)
        knobs = self.knobs_without_pair(
            pruning=pruning, max_candidates=max_candidates, max_depth=max_depth, max_nodes=max_nodes
        )
        if draft_sampling.greedy:
            raise ArgumentError(
                "draft_sampling has temperature 0, and a tree needs second choices: give 0.8, for instance"
            )
        self.rule = _named("rule", rule, RULES)
        self.pruning = pruning
        if pruning is not None:
            _named("pruning", pruning, PRUNERS)
        self.draft_sampling = draft_sampling
        self.guidance = Guidance.checked(self.draft, pair.target, alignment, alignment_weight, predictor)
        self.knobs = knobs

    @classmethod
    def for_pair(cls, pair: Pair, **options: Any) -> Self:
        """Build the decoder with the alignment and the predictor that lie beside the draft or ship for it, if any.

        Raises:
            ValueError: as for the class, or an unknown option.
            DraftTreeModelError: alignment or predictor are damaged, or were made for other models.
        """
        chosen = cls.checked_options(**options)
        draft = _draft_model(pair, cls.__name__)
        alignment = usual_alignment(draft, pair.target)
        predictor = None if alignment is None else usual_acceptance(draft, pair.target, alignment)
        return cls(pair, alignment=alignment, predictor=predictor, **vars(chosen))

    def cost_probe(self, max_target_tokens: int | None = None) -> CostProbe:
        """Return rounds with trees of every size, drafting by the draft's passes."""
        from .timing import probe  # which imports this module

        return probe(self, max_target_tokens)

    def fingerprint(self) -> Mapping[str, str]:
        """Return the digest of the guidance; nothing where there is none."""
        digest = self.guidance.digest()
        return {"guidance": digest} if digest else {}


def _draft_model(pair: Pair, decoder: str) -> LanguageModel:
    draft = require_draft(pair, decoder)
    if isinstance(draft, EagleDrafter):
        return HeadInTrees(draft)
    if not isinstance(draft, ModelDrafter):
        raise ArgumentError(
            f"{decoder} needs a model as draft, which knows how likely every token is; {pair.name} has {draft.name}"
        )
    draft.model.require_branches(f"a draft of {decoder}")
    return draft.model


def _named(what: str, name: str, known: Mapping[str, Known]) -> Known:
    if name not in known:
        raise ArgumentError(f"no {what} {name!r}; there are: {', '.join(known)}")
    return known[name]
