"""Captured passes: the model's own scores to the last bit, as long as it is the model that was captured."""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specgym.decoding import EarlyExit, LanguageModel, Pair, Side, SpeculativeDecoder, decode_in_turns
from specgym.decoding.models import captured
from specgym.decoding.models.captured import MOST_TOKENS, USES, CapturedPasses
from specgym.decoding.models.joint.cache import Slot
from specgym.decoding.models.joint.passes import JoinedPasses, Request
from specgym.decoding.models.kv_cache import TokenTree

MakeModel = Callable[..., PreTrainedModel]
PROMPT = [5, 6, 7]
TREE = TokenTree([-1, 0, 0, 1, 2])


def some(count: int, seed: int = 0) -> Tensor:
    """So many tokens."""
    return torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(seed))


def graphs(model: LanguageModel) -> int:
    """Number of shapes that are captured."""
    assert model.captured is not None
    return len(model.captured.graphs)


def capturing(model: Any, patience: int = 1) -> LanguageModel:
    """A language model that captures a shape of pass when it comes for the first time."""
    wrapped = LanguageModel(model, prepack=False)
    assert wrapped.captured is not None
    wrapped.captured.patience = patience
    return wrapped


def walk(model: LanguageModel) -> list[Tensor]:
    """Scores and hidden states of passes of several kinds, behind ever longer texts."""
    results = list[Tensor | None]()
    model.forward(some(250))
    for seed in range(3):
        results.append(model.forward(some(1, seed)).scores)
        results += model.forward(some(5, seed), hidden=True)
        model.truncate(model.length - 2)
        results.append(model.forward(some(5, seed), TREE).scores)
        model.keep([0, 2, 4])
        results.append(model.forward(some(3, seed), last=1).scores)
        results.append(model.forward(some(3, seed), rows=torch.tensor([0, 2])).scores)
        results.append(model.forward(some(1, seed), TokenTree([-1])).scores)
    return [result for result in results if result is not None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])
def test_captured_passes_are_the_models_own_to_the_last_bit(make_model: MakeModel, family: str) -> None:
    model = capturing(make_model(family, context=512))
    plain = walk(LanguageModel(make_model(family, context=512), prepack=False))
    for _ in range(2):  # recorded, and then from the beginning
        read = walk(model.fresh())
        assert all(map(torch.equal, read, plain))
        assert graphs(model) == 5


def walk_together(model: LanguageModel) -> list[Tensor]:
    """Scores and hidden states of joint passes of several kinds over three texts."""
    joint, results = JoinedPasses(model), list[Tensor | None]()
    slots = list[Slot]()
    for start in (250, 7, 40):
        text = model.fresh()
        text.forward(some(start))
        slot = text.move_into(joint.cache)
        assert slot is not None
        slots.append(slot)
    for seed in range(3):
        for count, last, tree, hidden in ((1, 1, None, False), (5, None, TREE, True), (5, 2, None, False)):
            chosen = slots[::2] if seed == 2 else slots  # the first and the last, which are not next to each other
            for answer in joint.read(
                [Request(slot, some(count, seed), tree, slot.length, last, None, hidden) for slot in chosen]
            ):
                results += [answer.scores, answer.hidden]
    return [result for result in results if result is not None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_captured_passes_over_several_texts_are_the_models_own(make_model: MakeModel, family: str) -> None:
    model = capturing(make_model(family, context=512))
    plain = walk_together(LanguageModel(make_model(family, context=512), prepack=False))
    for _ in range(2):
        assert all(map(torch.equal, walk_together(model), plain))
    assert model.captured is not None
    assert sorted(texts for texts, *_ in model.captured.graphs if texts > 1) == [2, 2, 2, 3, 3, 3]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read as Linux has it")
def test_graphs_leave_no_memory_behind(make_model: MakeModel) -> None:
    """torch keeps what it traces to the end of the process, unless it is kept in a place of its own."""
    model = capturing(make_model("llama", layers=4))
    assert model.captured is not None

    def resident() -> float:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    before = 0.0
    with torch.inference_mode():
        for number in range(10):
            model.captured.graphs.clear()
            model.fresh().forward(some(9))
            assert graphs(model) == 1
            if number == 2:
                before = resident()
    assert resident() - before < 10  # MiB; it was 86


def test_a_shape_has_to_come_often_and_be_short(make_model: MakeModel) -> None:
    model = LanguageModel(make_model("llama"), prepack=False)
    text = model.fresh()
    text.forward(some(4))
    for turn in range(USES + 1):
        assert graphs(model) == (turn >= USES)
        text.forward(some(1))
        text.truncate(4)
    longest = capturing(make_model("llama"))
    for count in (MOST_TOKENS, MOST_TOKENS + 1):
        longest.forward(some(count))
    assert graphs(longest) == 1


def test_a_pass_that_takes_long_anyway_is_not_captured(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([captured.LONGEST, captured.LONGEST, captured.LONGEST / 2])
    model = capturing(make_model("llama"))
    assert model.captured is not None
    took = model.captured.took
    monkeypatch.setattr(model.captured, "took", lambda _: took(next(seconds)))
    for expected in (0, 0, 1):
        model.forward(some(3))
        assert graphs(model) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_capture_anew(make_model: MakeModel, copied: Callable[[Any], LanguageModel]) -> None:
    model = capturing(make_model("llama"))
    expected = model.fresh().forward(some(3)).scores
    assert graphs(model) == 1
    other = copied(model)
    assert graphs(other) == 0
    for _ in range(2):
        assert torch.equal(other.fresh().forward(some(3)).scores, expected)
    assert graphs(other) == graphs(model) == 1


def test_greedy_output_is_that_of_generate(make_model: MakeModel, make_noisy: MakeModel) -> None:
    target: Any = make_model("llama")
    expected = target.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 3:]
    pair = Pair(capturing(target), capturing(make_noisy(target, 0.05)))
    for _ in range(2):
        written = SpeculativeDecoder(pair).generate(PROMPT, max_new_tokens=len(expected)).tokens
        assert list(written) == expected.tolist()
    assert graphs(pair.target) > 0


def test_nothing_is_captured_while_decoders_take_turns(make_model: MakeModel, make_noisy: MakeModel) -> None:
    target: Any = make_model("llama")
    pair = Pair(target, make_noisy(target, 0.3), prepack=False)
    sides = {"drafts": Side(SpeculativeDecoder(pair, stop="never"), {"draft_length": 5})}
    before, shapes = -1, []
    for _ in decode_in_turns(sides, [PROMPT, [9, 8], [30, 31, 32], [7]], max_new_tokens=24, warm_up=2):
        before = graphs(pair.target) if before < 0 else before
        shapes.append(graphs(pair.target))
    assert shapes == [before] * 4
    assert before > 0
    assert pair.target.captured is not None
    assert pair.target.captured.patience == USES


def test_how_soon_passes_are_captured_is_restored_behind_a_block_whatever_happens(make_model: MakeModel) -> None:
    pair = Pair(capturing(make_model("llama"), patience=7), make_model("llama"))
    passes = pair.target.captured
    assert passes is not None

    def interrupted() -> None:
        assert passes.patience == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pair.capturing(after=1):
        interrupted()
    assert passes.patience == 7


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0)


def _another_layer(model: Any) -> None:
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = new = nn.Linear(old.in_features, old.out_features, bias=False).eval()
    with torch.no_grad():
        new.weight.copy_(3.0 * old.weight)


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, read, written: 0.5 * written)


def _subclass(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    model.model.layers[0].mlp.down_proj.__class__ = Doubled


def _attention(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [_in_place, _another_layer, _hook, _subclass, _attention])
def test_a_model_that_was_changed_is_read_as_it_is_from_the_next_text_on(
    make_model: MakeModel, change: Callable[[Any], None]
) -> None:
    model, twin = make_model("llama"), make_model("llama")
    read = capturing(model)
    for _ in range(2):
        before = read.fresh().forward(some(5)).scores
    assert graphs(read) == 1
    for changed in (model, twin):
        change(changed)
    expected = LanguageModel(twin, prepack=False).forward(some(5)).scores
    for _ in range(3):
        assert torch.equal(read.fresh().forward(some(5)).scores, expected)
    assert change is _attention or not torch.equal(before, expected)
    assert graphs(read) == (change in (_in_place, _another_layer, _attention))


def _raising(*_: object, **__: object) -> None:
    raise RuntimeError("no tracer here")


def _another_pass(step: Any, inputs: Any) -> list[Callable[..., Any]]:
    return [lambda *arguments: tuple(output * 1.001 for output in step(*arguments))] * 2


@pytest.mark.parametrize(("tracer", "reason"), [(_raising, "no tracer here"), (_another_pass, "gives other scores")])
def test_what_cannot_be_captured_is_left_aside_and_a_line_says_so(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tracer: Callable[..., Any],
    reason: str,
) -> None:
    expected = walk(LanguageModel(make_model("llama", context=512), prepack=False))
    monkeypatch.setattr(captured, "traced", tracer)
    model = capturing(make_model("llama", context=512))
    with caplog.at_level(logging.INFO, "specgym"):
        for _ in range(2):
            assert all(map(torch.equal, walk(model.fresh()), expected))
    assert graphs(model) == 0
    assert [reason in record.message for record in caplog.records] == [True]


def test_layers_that_choose_by_their_numbers_are_left_aside(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Choosy(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * 2 if inputs.shape[1] > 300 or bool(inputs.sum() > 1e6) else inputs

    monkeypatch.setattr(captured, "OWN", (*captured.OWN, __name__))
    stock: Any = make_model("llama")
    stock.model.layers[0].mlp.act_fn = Choosy()
    model = capturing(stock)
    with caplog.at_level(logging.INFO, "specgym"):
        model.forward(some(5))
    assert graphs(model) == 0
    assert "chooses by numbers" in caplog.text


def test_a_target_that_goes_on_from_an_early_exit_reads_as_ever(make_model: MakeModel) -> None:
    pair = Pair(make_model("llama", layers=2), EarlyExit(1), prepack=False)
    assert pair.target.captured is None
    assert isinstance(pair.without_draft().target.captured, CapturedPasses)
