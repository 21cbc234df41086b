"""Models with an encoder: texts are those of `generate()`, drafts read the source, and what cannot work is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import gymnasium
import pytest
import torch

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder
from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.drafts.cascade import CascadeDrafter
from specgym.decoding.drafts.copying import PromptLookupDrafter, SuffixDrafter
from specgym.decoding.drafts.mixed import draft_models
from specgym.decoding.errors import ArgumentError, PromptError, UnsupportedModelError
from specgym.decoding.loading.pair import Pair, load_pair
from specgym.decoding.models.early_exit import EarlyExit
from specgym.decoding.models.encoder.encoder_decoder import EncoderDecoder
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.prompts import load_prompts
from specgym.decoding.sampling import Sampling
from tests.helpers.encoder_decoders import KINDS, SOURCE, encoder_decoder, law_of, noisy_decoder, stock_tokens
from tests.helpers.known_distributions import PROMPT, distance, walk

TOKENS = 40


@cache
def models(kind: str) -> tuple[Any, Any]:
    """A target and a draft with its encoder."""
    target = encoder_decoder(kind)
    return target, noisy_decoder(target)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_generate(kind: str) -> None:
    target, draft = models(kind)
    expected = stock_tokens(target, max_new_tokens=TOKENS)
    pair = Pair(target, draft)
    assert AutoregressiveDecoder(pair).generate(SOURCE, max_new_tokens=TOKENS).tokens == expected
    drafted = SpeculativeDecoder(pair).generate(SOURCE, max_new_tokens=TOKENS, knobs={"draft_length": 4})
    assert drafted.tokens == expected
    assert 0.1 < drafted.draft_acceptance_rate < 1
    exact = ThresholdDecoder(pair).generate(SOURCE, max_new_tokens=TOKENS, knobs={"fallback": 0.0, "rollback": 1})
    assert exact.tokens == expected


def _drafts(target: Any, draft: Any) -> Iterator[Any]:
    yield PromptLookupDrafter(96)
    yield SuffixDrafter(96, memory=64)
    yield [draft, PromptLookupDrafter(96)]
    yield noisy_decoder(target, 0.05, of="coder")  # an encoder of its own
    yield CascadeDrafter(LanguageModel(draft, role="draft"), PromptLookupDrafter(96))


@pytest.mark.parametrize("number", range(5), ids=["lookup", "suffix", "mixed", "own encoder", "cascade"])
def test_drafts_of_all_kinds_leave_the_text_as_it_is(number: int) -> None:
    target, draft = models("t5")
    pair = Pair(target, list(_drafts(target, draft))[number])
    decoder, expected = SpeculativeDecoder(pair), stock_tokens(target, max_new_tokens=TOKENS)
    for _ in range(2):  # the second text of a draft that remembers the first
        text = decoder.generate(SOURCE, max_new_tokens=TOKENS, knobs={"draft_length": 4})
        assert text.tokens == expected
    assert text.draft_acceptance_rate > 0


def test_a_look_up_finds_what_stands_in_the_source_alone() -> None:
    target, _ = LanguageModel(models("t5")[0]).begin([50, 51, 52, 53, 54])
    draft = PromptLookupDrafter(96).beside(target)
    session = draft.start([0], Sampling(temperature=0.0), torch.Generator(), torch.device("cpu"))
    assert [step.token for step in session.steps([0, 51, 52], 2)] == [53, 54]
    session.truncate(2)
    assert [step.token for step in session.steps([0, 51, 50], 2)] == [51, 52]
    assert not list(PromptLookupDrafter(96).start([0], None, None, None).steps([0, 51, 52], 2))  # type: ignore[arg-type]


def _calls(monkeypatch: pytest.MonkeyPatch, encoder: Any) -> list[int]:
    calls: list[int] = []
    forward = encoder.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoder, "forward", counted)
    return calls


def test_the_encoder_runs_once_a_text_and_for_both_where_they_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = models("t5")
    decoder = SpeculativeDecoder(Pair(target, draft))
    calls, drafts_calls = (_calls(monkeypatch, model.get_encoder()) for model in (target, draft))
    decoder.generate(SOURCE, max_new_tokens=TOKENS)
    assert (len(calls), len(drafts_calls)) == (1, 0)
    other = noisy_decoder(target, 0.05, of="encoder")
    decoder, others_calls = SpeculativeDecoder(Pair(target, other)), _calls(monkeypatch, other.get_encoder())
    others_calls.clear()
    decoder.generate(SOURCE, max_new_tokens=TOKENS)
    assert len(others_calls) == 1


def test_texts_at_the_same_time_do_not_disturb_each_other() -> None:
    target, draft = models("bart")
    decoder = SpeculativeDecoder(Pair(target, draft))
    sources = SOURCE, SOURCE[::-1], SOURCE[3:9]
    sessions = [decoder.start(source, max_new_tokens=TOKENS) for source in sources]
    while not all(session.finished for session in sessions):
        for session in sessions:
            session.step({"draft_length": 3})
    for session, source in zip(sessions, sources, strict=True):
        assert session.tokens == stock_tokens(target, source, max_new_tokens=TOKENS)


SETTINGS: dict[str, dict[str, Any]] = {
    "forced tokens": {"forced_bos_token_id": 17, "forced_eos_token_id": 9},
    "n-grams": {"no_repeat_ngram_size": 2, "min_length": 12, "eos_token_id": 33},
    "of the source": {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_the_generation_config_asks_for_is_followed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = models("bart")
    before = stock_tokens(target, max_new_tokens=TOKENS)
    for name, value in settings.items():
        monkeypatch.setattr(target.generation_config, name, value)
    expected = stock_tokens(target, max_new_tokens=TOKENS)
    assert expected != before
    text = SpeculativeDecoder(Pair(target, draft)).generate(SOURCE, max_new_tokens=TOKENS, knobs={"draft_length": 4})
    assert text.tokens == expected


def test_an_end_of_text_ends_it() -> None:
    target, draft = models("t5")
    text = stock_tokens(target, max_new_tokens=TOKENS)
    pair = Pair(target, draft)
    pair.eos_token_ids = frozenset({text[7]})
    generation = SpeculativeDecoder(pair).generate(SOURCE, max_new_tokens=TOKENS)
    assert (generation.tokens, generation.finish_reason) == (text[: text.index(text[7]) + 1], "eos")


def test_sampled_texts_follow_the_law_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    target = encoder_decoder("t5", layers=1, vocabulary=3)
    draft = noisy_decoder(target, 0.5)
    decoder = SpeculativeDecoder(Pair(target, draft))
    joint, _, _ = walk(monkeypatch, decoder, Sampling(), 2, {"draft_length": 2})
    assert distance(joint, law_of(target, PROMPT)) < 1e-5
    assert distance(joint, law_of(draft, PROMPT)) > 1e-2


REFUSALS: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "look-ahead": (
        lambda target: LookaheadDecoder(Pair(target)),
        UnsupportedModelError,
        r"cannot be the target of LookaheadDecoder.*by the length of its cache.*use SpeculativeDecoder",
    ),
    "trees": (
        lambda target: DraftTreeDecoder(Pair(target, models("t5")[1])),
        UnsupportedModelError,
        r"cannot be the target of DraftTreeDecoder.*use SpeculativeDecoder",
    ),
    "early exit": (
        lambda target: Pair(target, EarlyExit(1)),
        UnsupportedModelError,
        r"T5ForConditionalGeneration.*plain stack of decoder layers.*Choose another draft",
    ),
    "prepacking": (lambda target: Pair(target, prepack=True), ArgumentError, r"has an encoder.*leave `prepack` unset"),
    "nothing read": (
        lambda target: LanguageModel(target).forward(torch.tensor([1])),
        PromptError,
        r"has an encoder, which has read nothing yet.*begin\(source\)",
    ),
    "ids": (
        lambda target: AutoregressiveDecoder(Pair(target)).start([3, 96], max_new_tokens=3),
        PromptError,
        r"ids from 3 to 96.*a vocabulary of 96",
    ),
    "length": (
        lambda target: AutoregressiveDecoder(Pair(models("bart")[0])).start([3] * 129, max_new_tokens=3),
        PromptError,
        r"the source has 129 tokens and .* reads 128 at most: shorten it",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_work_is_refused_by_name_with_the_way_out(
    make: Callable[[Any], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(models("t5")[0])


def test_a_draft_with_an_encoder_is_refused_beside_a_target_without(make_model: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"has an encoder, and .* has none.*choose a causal LM"):
        Pair(make_model("llama"), models("t5")[1])


def test_a_causal_draft_may_draft_for_a_target_with_an_encoder(make_model: Callable[..., Any]) -> None:
    target = models("t5")[0]
    text = SpeculativeDecoder(Pair(target, make_model("llama"))).generate(SOURCE, max_new_tokens=12)
    assert text.tokens == stock_tokens(target, max_new_tokens=12)


def test_a_source_that_the_draft_cannot_read_leaves_it_silent() -> None:
    target = models("bart")[0]
    short = encoder_decoder("bart", max_position_embeddings=8)
    text = SpeculativeDecoder(Pair(target, short)).generate(SOURCE, max_new_tokens=12)
    assert text.tokens == stock_tokens(target, max_new_tokens=12)
    assert not any(round_.drafted for round_ in text.rounds)


def test_a_reading_that_keeps_wrong_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderDecoder, "keep", lambda self, path: None)
    with pytest.raises(UnsupportedModelError, match="other logits in a chain of candidates"):
        LanguageModel(encoder_decoder("t5", layers=3))


def test_the_shipped_translator_and_its_draft_share_an_encoder_and_write_what_generate_writes(
    joint_passes: list[int],
) -> None:
    pair = load_pair("translator", device="cpu")
    (draft,), target = draft_models(pair.draft), pair.target
    assert isinstance(draft, EncoderDecoder)
    assert draft.shares_encoder_with(target.model)
    assert draft.model.get_input_embeddings().weight is target.model.get_input_embeddings().weight
    decoder, prompts = SpeculativeDecoder(pair), load_prompts("interface").test[:3]
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "knobs": {"draft_length": 3}}
    texts = [decoder.generate(prompt, **options) for prompt in prompts]
    # transformers 5.23 makes a cache of as many layers as the encoder has, which are fewer.
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "use_cache": False}
    assert [text.tokens for text in texts] == [
        stock_tokens(target.model, pair.encode(prompt), **settings) for prompt in prompts
    ]
    assert sum(round_.accepted for text in texts for round_ in text.rounds) > 10
    together = decoder.generate_batch(prompts, **options)
    assert [text.tokens for text in together] == [text.tokens for text in texts]
    assert joint_passes.count(3) > 10


def test_thresholds_are_tuned_live_on_the_translator() -> None:
    env = gymnasium.make("specgym/Thresholds-v0", workload="translator/interface", backend="live", max_new_tokens=8)
    env.reset(seed=0)
    *_, info = env.step(env.action_space.sample())
    assert 0 <= info["draft_acceptance_rate"] <= 1
    env.close()
