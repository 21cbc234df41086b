"""Heads along a text: unrolled in training they give what they give in decoding, whatever was read before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding import EagleHead, EagleHeadError, LanguageModel, Pair, Sampling
from specgym.decoding.drafts.drafter import beside
from specgym.decoding.drafts.eagle.drafter import EagleSession
from specgym.decoding.drafts.eagle.layer import HeadShape
from specgym.decoding.drafts.eagle.target import StatesTarget
from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.fit.eagle import unroll
from specgym.decoding.models.kv_cache import TokenTree
from tests.helpers.small_eagle_heads import small_head

MakeModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
TEXT = [5, 17, 80, 3, 44, 9, 9, 61, 2, 30, 71, 12, 7, 40]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama", layers=4, spread=0.15)


def pair_of(model: PreTrainedModel, **options: Any) -> Pair:
    return Pair(model, small_head(model, spread=2.0, **options), prepack=False)


def session_at(pair: Pair, text: list[int], prompt: int) -> EagleSession:
    """The head of a pair at work on the beginning of a text that its target has read."""
    assert pair.draft is not None
    target = pair.target.fresh()
    target.read(text[: prompt - 1])
    session: Any = beside(pair.draft, target).start(text[:prompt], Sampling(0.0), torch.Generator(), CPU)
    return session


def drafted_scores(session: EagleSession, text: list[int], prompt: int, count: int) -> list[Tensor]:
    """Scores of the tokens after a prompt, the text's tokens being taken for what was drafted."""
    return [session._catch_up(text[: prompt + number])[0] for number in range(count)]


def unrolled_scores(pair: Pair, text: list[int], steps: int) -> list[Tensor]:
    """Scores at all positions, as training computes them, by the tokens drafted before."""
    head: EagleHead = pair.draft.head  # type: ignore[union-attr]
    target: Any = pair.target.fresh()
    target.read(text)
    with torch.inference_mode():
        feature = head.fused(target.states.between(0, len(text) - 1))[None]
        states = unroll.unrolled(head, head.embeddings(torch.tensor([text[1:]])), feature, steps)
        return [head.all_scores(part[0]) for part in states]


@pytest.mark.parametrize("options", [{}, {"vocabulary": range(0, 96, 2)}, {"own_output": True, "layers": (0, 3)}])
def test_training_computes_what_decoding_does(model: PreTrainedModel, options: dict[str, Any]) -> None:
    pair = pair_of(model, **options)
    steps = unrolled_scores(pair, TEXT, 4)
    for prompt in range(2, len(TEXT) - 3):
        session = session_at(pair, TEXT, prompt)
        for number, scores in enumerate(drafted_scores(session, TEXT, prompt, 4)):
            torch.testing.assert_close(scores, steps[number][prompt - 2 + number], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", ["sees the target's later states", "reads the feature of its own place"])
def test_a_wrong_unrolling_is_found_out(model: PreTrainedModel, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(model)
    right = unrolled_scores(pair, TEXT, 3)
    later = unroll._later
    monkeypatch.setattr(unroll, "_later", lambda states, count: later(states, max(0, count - (wrong[0] == "r"))))
    if wrong[0] == "s":
        fill = Tensor.masked_fill
        monkeypatch.setattr(Tensor, "masked_fill", lambda self, mask, value: fill(self, mask.roll(-1, 1), value))
    other = unrolled_scores(pair, TEXT, 3)
    assert torch.equal(right[0], other[0])
    assert not torch.allclose(right[2][4:], other[2][4:], rtol=1e-2, atol=1e-2)


def test_proposals_depend_on_the_text_alone(model: PreTrainedModel) -> None:
    """After rollbacks, drafts left half done and tokens of other drafts they are those of a fresh reading."""
    pair = pair_of(model)
    target = pair.target.fresh()
    target.read(TEXT[:3])
    assert pair.draft is not None
    session: Any = beside(pair.draft, target).start(TEXT[:4], Sampling(0.0), torch.Generator(), CPU)
    generator = torch.Generator().manual_seed(0)
    text, length = TEXT[:4], 4
    for turn in range(24):
        drafted = [int(step.token) for step, _ in zip(session.steps(text, 4), range(1 + turn % 4), strict=False)]
        guess = [*drafted, *torch.randint(96, (turn % 3,), generator=generator).tolist()]
        more = list(session.steps([*text, *guess], 2)) if turn % 2 else []
        fresh = session_at(pair, text, len(text))
        expected = fresh._catch_up([*text, *guess])
        torch.testing.assert_close(session._catch_up([*text, *guess]), expected, rtol=1e-3, atol=1e-3)
        assert [int(step.token) for step in more] == [
            int(step.token) for step in fresh.steps([*text, *guess], 2 * len(more))
        ][: len(more)]
        target.forward(torch.tensor([text[-1], *guess]))
        kept = int(torch.randint(len(guess) + 1, (1,), generator=generator))
        length = len(text) + kept
        text = [*text, *guess[:kept], (7 * turn) % 96]
        target.truncate(len(text) - 1)
        session.truncate(length)
        if len(text) > 60:
            text = text[:30]
            target.truncate(29)
            session.truncate(20)


@pytest.mark.parametrize("captured", [False, True])
def test_states_after_rollback_are_those_of_a_fresh_reading(make_model: MakeModel, captured: bool) -> None:
    model, twin = (make_model("llama", layers=4, spread=0.15) for _ in range(2))
    target: Any = StatesTarget(LanguageModel(model), (0, 2, 3))
    assert target.captured is not None
    target.captured.patience = 1 if captured else 2**62
    whole, text = target.fresh(), torch.tensor(TEXT)
    whole.forward(text)
    expected = whole.states.between(0, len(TEXT))
    with torch.inference_mode():
        layers = twin(text[None], output_hidden_states=True).hidden_states  # which leaves hooks behind
    torch.testing.assert_close(expected, torch.cat([layers[0], layers[2], layers[3]], -1)[0], rtol=1e-3, atol=1e-3)
    for _ in range(3):
        some = target.fresh()
        some.read(TEXT[:2])
        some.forward(torch.tensor([TEXT[2], 1, 2]))
        some.truncate(3)
        some.forward(text[3:6], rows=torch.tensor([1]))
        # A tree, of which one path stays.
        some.forward(torch.tensor([TEXT[6], 1, TEXT[7], 2, TEXT[8]]), TokenTree([-1, 0, 0, 1, 2]))
        some.keep([0, 2, 4])
        some.forward(text[9:10], hidden=True)
        some.forward(text[10:])
        assert some.states.length == some.length == len(TEXT)
        torch.testing.assert_close(some.states.between(0, len(TEXT)), expected, rtol=1e-3, atol=1e-3)
    assert bool(target.captured.graphs) is captured


def test_sizes_that_make_no_sense_are_refused(model: PreTrainedModel) -> None:
    shape = {
        "hidden_size": 32, "target_hidden_size": 32, "vocabulary_size": 96, "layers": (0, 1), "heads": 4, "kv_heads": 2,
        "head_dim": 8, "intermediate_size": 64,
    }  # fmt: skip
    for wrong, words in (
        ({"layers": (2, 1)}, "ascending"),
        ({"heads": 3}, "cannot share"),
        ({"vocabulary": (3, 3)}, "ascending order"),
        ({"vocabulary": (3, 96)}, "token 96, and the target has 96"),
        ({"rope": {"rope_type": "dynamic", "rope_theta": 1e4}}, "depends on the length"),
        ({"hidden_size": 16}, "embeddings of its own"),
        ({"kv_heads": 0}, "kv_heads"),
    ):
        with pytest.raises(EagleHeadError, match=words):
            HeadShape(**{**shape, **wrong})  # type: ignore[arg-type]
    with pytest.raises(EagleHeadError, match="has 4 layers, counted from 0, and layer 4 is asked for"):
        EagleHead.for_target(model, layers=(0, 4))


def test_other_targets_are_refused_with_a_way_out(model: PreTrainedModel, make_model: MakeModel) -> None:
    head = small_head(model)
    for other in (make_model("llama", layers=3), make_model("llama", layers=4, vocabulary=64)):
        with pytest.raises(EagleHeadError, match=r"train one for it: python -m specgym\.decoding\.fit eagle"):
            Pair(other, head)
    with pytest.raises(EagleHeadError, match="not like Llama's"):
        EagleHead.for_target(make_model("gpt2"))
    shape = HeadShape(32, 32, 96, (0, 1), 4, 2, 8, 64)
    with pytest.raises(UnsupportedModelError, match=r"cannot keep its hidden states for an EAGLE head: .*Choose"):
        Pair(make_model("gpt_neox"), EagleHead(shape))
    pair = Pair(model, head, prepack=False)
    assert pair.draft is not None
    with pytest.raises(UnsupportedModelError, match="drafts in a text that its target reads"):
        pair.draft.start(TEXT, Sampling(0.0), torch.Generator(), CPU)
    with pytest.raises(UnsupportedModelError, match=r"hidden states that .* does not keep here"):
        beside(pair.draft, LanguageModel(model, prepack=False))
