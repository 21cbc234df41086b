"""Recording reads many branches at once, and finds what a draft and a plain pass at each position would find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from specgym.decoding import (
    AutoregressiveDecoder,
    LanguageModel,
    NGramDrafter,
    OneHotStep,
    Pair,
    PromptError,
    PromptLookupDrafter,
    Sampling,
)
from specgym.decoding.drafts.drafter import Drafter, DraftSession, DraftStep, ModelDrafter, beside, propose
from specgym.decoding.sampling import total_variation
from specgym.envs.recordings.draft_recorder import STRETCH, Recorder
from tests.helpers.other_words import SPELLED, translated_twin
from tests.helpers.small_eagle_heads import small_head
from tests.helpers.table_models import TableModel, random_table

K = 5
PROMPT = [3, 1, 4, 1, 5]
MakeModel = Callable[..., PreTrainedModel]


def continuation(pair: Pair, tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(pair.target.vocabulary_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_draft_of_another_tokenizer_is_recorded_as_it_drafts() -> None:
    target = TableModel(random_table(6, 1))
    pair = Pair(target, ModelDrafter(translated_twin(target, 0.5)))
    assert pair.draft is not None
    prompt, text = [2, SPELLED, 3], continuation(pair, 40)
    assert SPELLED in text
    rows = Recorder(pair, Sampling(0.0), K).record(prompt, text, seed=0)
    for place in range(len(text)):
        context = [*prompt, *text[:place]]
        session = pair.draft.start(context, Sampling(0.0), torch.Generator(), torch.device("cpu"))
        assert rows["tokens"][place].tolist() == propose(session, context, K).tokens.tolist()
    assert rows["match"].any()


def plain(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token, from the model as it came."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].float()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.8, top_k=20)], ids=["greedy", "sampled"])
def test_every_position_is_as_if_drafted_and_read_alone(
    make_model: MakeModel, make_noisy: MakeModel, family: str, sampling: Sampling
) -> None:
    target, draft = make_model(family), make_noisy(make_model(family), 0.3)
    pair = Pair(target, draft, prepack=False)
    text = continuation(pair, 40)  # longer than a stretch
    rows = Recorder(pair, sampling, K).record(PROMPT, text, seed=0)
    warped = sampling if not sampling.greedy else Sampling(1.0)
    for place in (0, 1, 31, 32, 39):
        assert rows["drafted"][place] == K
        context = [*PROMPT, *text[:place]]
        for depth in range(K):
            p, q = (warped.probabilities(plain(model, context)) for model in (target, draft))
            token = int(rows["tokens"][place, depth])
            if sampling.greedy:
                assert token == int(q.argmax())
            assert rows["match"][place, depth] == (token == int(p.argmax()))
            assert rows["successor"][place, depth] == int(p.argmax())
            expected = {
                "p": p[token],
                "q": q[token],
                "confidence": q.max(),
                "entropy": torch.special.entr(q).sum(),
                "target_entropy": torch.special.entr(p).sum(),
                "distance": total_variation(p, q),
            }
            likeliest = plain(draft, context).softmax(-1).topk(10).values
            expected["top_ten"] = likeliest[0] / likeliest.sum()
            for name, value in expected.items():
                assert rows[name][place, depth] == pytest.approx(float(value), rel=1e-3, abs=1e-4), (name, place, depth)
            context.append(token)
        assert rows["successor"][place, K] == int(plain(target, context).argmax())


@pytest.mark.parametrize("kind", ["model", "lookup", "both"])
def test_a_target_that_reads_chains_alone_is_recorded_as_one_that_reads_trees(
    make_model: MakeModel, make_noisy: MakeModel, kind: str
) -> None:
    model = make_model("llama")
    draft, lookup = make_noisy(model, 0.02), PromptLookupDrafter(96, longest=2)
    drafts: Any = {"model": draft, "lookup": lookup, "both": [draft, lookup]}[kind]
    pair = Pair(model, drafts, prepack=False)
    text = AutoregressiveDecoder(pair).generate(PROMPT, max_new_tokens=STRETCH + 4).tokens
    in_trees = Recorder(pair, Sampling(0.0), K).record_each(PROMPT, text, seed=0)
    pair.target.branches = False  # as `Reading` says of a model that cannot
    in_chains = Recorder(pair, Sampling(0.0), K).record_each(PROMPT, text, seed=0)
    for rows, others in zip(in_trees, in_chains, strict=True):
        assert rows["match"].any()
        for name, values in rows.items():
            assert others[name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("kind", ["n-gram", "lookup"])
def test_a_draft_without_probabilities_is_recorded_as_far_as_it_goes(make_model: MakeModel, kind: str) -> None:
    target = make_model("llama")
    text = continuation(Pair(target, prepack=False), 20) * 2
    table: Drafter = NGramDrafter.fit([text[:15]], 96, order=3)
    drafter = table if kind == "n-gram" else PromptLookupDrafter(96)
    pair = Pair(target, drafter, prepack=False)
    rows = Recorder(pair, Sampling(0.0), K).record(PROMPT, text, seed=0)
    session = drafter.start(PROMPT, Sampling(0.0), torch.Generator(), torch.device("cpu"))
    lengths = set()
    for place in range(len(text)):
        context = [*PROMPT, *text[:place]]
        expected = propose(session, context, K).tokens.tolist()
        count = int(rows["drafted"][place])
        lengths.add(count)
        assert rows["tokens"][place, :count].tolist() == expected
        assert not rows["tokens"][place, count:].any()
        if count:
            p = plain(target, context).softmax(-1)[expected[0]]
            assert rows["distance"][place, 0] == pytest.approx(1 - float(p), abs=1e-4)
            assert (rows["q"][place, :count] == 1).all()
            assert (rows["entropy"][place, :count] == 0).all()
            assert (rows["confidence"][place, :count].astype(float) > 0).all()
            assert (rows["top_ten"][place, :count] == rows["confidence"][place, :count]).all()
    assert 0 in lengths
    assert len(lengths) > 1


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0)], ids=["greedy", "sampled"])
def test_a_draft_that_is_read_in_chains_is_recorded_as_it_drafts(make_model: MakeModel, sampling: Sampling) -> None:
    target = make_model("llama")
    pair = Pair(target, torch.ao.quantization.quantize_dynamic(make_model("llama"), {torch.nn.Linear}), prepack=False)
    assert isinstance(pair.draft, ModelDrafter)
    assert not pair.draft.model.branches
    text = continuation(pair, 40)
    rows = Recorder(pair, sampling, K).record(PROMPT, text, seed=0)
    session = pair.draft.start(PROMPT, sampling, torch.Generator().manual_seed(0), torch.device("cpu"))
    for place in range(len(text)):
        context = [*PROMPT, *text[:place]]
        proposal = propose(session, context, K)
        session.truncate(len(context))
        assert proposal.logits is not None
        assert rows["tokens"][place].tolist() == proposal.tokens.tolist()
        q = proposal.logits.softmax(-1).gather(-1, proposal.tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.from_numpy(rows["q"][place]), q)
    assert 0.2 < rows["match"].mean() < 1  # the same weights, rounded


def test_a_sampled_draft_follows_the_drafts_distribution() -> None:
    target, draft = (TableModel(random_table(8, seed)) for seed in (1, 2))
    recorder = Recorder(Pair(target, draft), Sampling(1.0), 1)
    text = [2] * 300  # a table looks at the last two tokens alone
    drawn = np.concatenate([recorder.record([2, 2], text, seed)["tokens"][:, 0] for seed in range(5)])
    q = draft.fresh().forward(torch.tensor([2, 2])).scores[1].softmax(-1).numpy()
    # Of 1500 draws every share lies within four standard deviations of its probability, at most 0.052.
    shares = np.bincount(drawn, minlength=8) / len(drawn)
    assert np.abs(shares - q).max() < 4 * np.sqrt(0.25 / len(drawn))
    assert np.abs(shares - 1 / 8).max() > 4 * np.sqrt(0.25 / len(drawn))  # the bound could tell a uniform draft


def test_recording_costs_at_most_half_more_arithmetic_than_it_needs(
    make_model: MakeModel, make_noisy: MakeModel
) -> None:
    drafts = 16
    target = make_model("llama", hidden=128, vocabulary=512, layers=3, context=512)
    draft = make_noisy(make_model("llama", hidden=128, vocabulary=512, layers=1, context=512), 0.3)
    pair = Pair(target, draft, prepack=False)
    prompt, text = continuation(pair, 40, 1), continuation(pair, 96, 2)
    with FlopCounterMode(display=False) as spent:
        Recorder(pair, Sampling(0.0), drafts).record(prompt, text, 0)
    needed = 0.0
    for model, passes in ((pair.target, drafts), (pair.draft.model, drafts - 1)):  # type: ignore[union-attr]
        single = model.fresh()
        with FlopCounterMode(display=False) as counter:
            single.read([*prompt, *text])
        reading = counter.get_total_flops()
        single.truncate(len(prompt) + len(text) // 2)
        with FlopCounterMode(display=False) as counter:
            single.forward(torch.tensor(text[:passes]))
        needed += reading + len(text) * counter.get_total_flops()
    assert 0.9 * needed < spent.get_total_flops() < 1.5 * needed


def test_a_text_that_leaves_no_room_for_a_draft_is_refused(make_model: MakeModel, make_noisy: MakeModel) -> None:
    target = make_model("llama", context=64)
    pair = Pair(target, make_noisy(target, 0.3), prepack=False)
    recorder = Recorder(pair, Sampling(0.0), K)
    text = continuation(pair, 64 - K - len(PROMPT))
    assert len(recorder.record(PROMPT, text, 0)["drafted"]) == len(text)
    with pytest.raises(PromptError, match=r"do not fit into the context of .* \(64\); record fewer tokens"):
        recorder.record(PROMPT, [*text, 1], 0)


class _Alternating:
    """A draft that is no model, and whose tokens are now certain, now drawn from a model's distribution."""

    name, vocabulary_size = "alternating", 96

    def __init__(self, inner: ModelDrafter) -> None:
        self.inner = inner

    def start(self, *arguments: Any) -> Any:
        return _AlternatingSession(self.inner.start(*arguments))


class _AlternatingSession:
    def __init__(self, inner: DraftSession) -> None:
        self._inner = inner

    def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
        for number, step in enumerate(self._inner.steps(context, count)):
            certain = (len(context) + number) % 2
            yield OneHotStep(int(step.token), 0.5, matched=300) if certain else step

    def truncate(self, length: int) -> None:
        self._inner.truncate(length)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0)], ids=["greedy", "sampled"])
def test_a_draft_of_both_kinds_of_tokens_is_recorded_token_by_token(
    make_model: MakeModel, make_noisy: MakeModel, sampling: Sampling
) -> None:
    target = make_model("llama")
    model = ModelDrafter(LanguageModel(make_noisy(target, 0.3), prepack=False))
    pair = Pair(target, _Alternating(model), prepack=False)
    text = continuation(pair, 6)
    rows = Recorder(pair, sampling, K).record(PROMPT, text, seed=0)
    for place in range(len(text)):
        context = [*PROMPT, *text[:place]]
        for depth in range(K):
            token, certain = int(rows["tokens"][place, depth]), (len(context)) % 2
            q = plain(model.model.model, context).softmax(-1)
            top = q.topk(10).values
            p = plain(target, context).softmax(-1)
            one_hot = torch.nn.functional.one_hot(torch.tensor(token), 96).float()
            expected = {
                "q": 1.0 if certain else float(q[token]),
                "confidence": 0.5 if certain else float(q.max()),
                "entropy": 0.0 if certain else float(torch.special.entr(q).sum()),
                "top_ten": 0.5 if certain else float(top[0] / top.sum()),
                "matched": 255 if certain else 0,
                "distance": float(total_variation(p, one_hot if certain else q)),
            }
            for name, value in expected.items():
                assert rows[name][place, depth] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, place, depth)
            context.append(token)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0)], ids=["greedy", "sampled"])
def test_a_head_is_recorded_as_it_drafts_after_each_position(make_model: MakeModel, sampling: Sampling) -> None:
    model = make_model("llama", layers=3)
    pair = Pair(model, small_head(model, spread=3.0), prepack=False)
    assert pair.draft is not None
    text = continuation(pair, STRETCH + 3)
    rows = Recorder(pair, sampling, K).record(PROMPT, text, seed=0)
    for place in (0, 1, STRETCH - 1, STRETCH, STRETCH + 2):
        context = [*PROMPT, *text[:place]]
        target = pair.target.fresh()
        target.read(context[:-1])
        tokens = rows["tokens"][place].tolist()
        for depth in range(K):  # what was drawn at one depth is the text of the next
            session = beside(pair.draft, target).start(context, sampling, torch.Generator(), torch.device("cpu"))
            step = next(iter(session.steps([*context, *tokens[:depth]], 1)))
            assert step.logits is not None
            q = step.logits.softmax(-1)[0]
            assert rows["q"][place, depth] == pytest.approx(float(q[tokens[depth]]), rel=1e-3, abs=1e-5)
            assert rows["confidence"][place, depth] == pytest.approx(float(q.max()), rel=1e-3, abs=1e-5)
            p = plain(model, [*context, *tokens[:depth]]).softmax(-1)
            assert rows["p"][place, depth] == pytest.approx(float(p[tokens[depth]]), rel=1e-3, abs=1e-5)


def test_what_drafts_have_in_common_is_read_once(
    make_model: MakeModel, make_noisy: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = LanguageModel(make_model("llama"), prepack=False)
    drafts = [ModelDrafter(LanguageModel(make_noisy(target.model, noise), prepack=False)) for noise in (0.0, 0.3)]
    read: list[int] = []
    forward = LanguageModel.forward

    def counting(self: LanguageModel, tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if self.model is target.model:
            read.append(len(tokens))
        return forward(self, tokens, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "forward", counting)
    text = AutoregressiveDecoder(Pair(target)).generate(PROMPT, max_new_tokens=12).tokens
    counts = {}
    for name, chosen in (("right", drafts[:1]), ("noisy", drafts[1:]), ("both", drafts), ("twice", [drafts[1]] * 2)):
        read.clear()
        Recorder(Pair(target, chosen), Sampling(0.0), K).record_each(PROMPT, text, 0)
        counts[name] = sum(read)
    assert counts["right"] < len(PROMPT) + len(text) + 2 * K  # its chains are the text, and go on at its end
    assert counts["twice"] == counts["noisy"] > counts["right"]
    assert counts["both"] < counts["noisy"] + K + 1
