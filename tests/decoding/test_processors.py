"""A target's generation config: what it asks for is done as `generate()` does it, by every decoder, or named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from specgym.decoding import (
    AutoregressiveDecoder,
    Decoder,
    DraftTreeDecoder,
    LookaheadDecoder,
    MedusaDecoder,
    NumericalError,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    TextRules,
    ThresholdDecoder,
    target_digest,
    text_settings,
)
from specgym.decoding.latency.interleaved import fingerprint
from specgym.envs.recordings.draft_recorder import Recorder
from tests.helpers.first_tokens import assert_texts_follow_the_target, usual
from tests.helpers.small_medusa_heads import taught_heads
from tests.helpers.table_models import readable_table

MakeModel = Callable[..., PreTrainedModel]
MakeTable = Callable[..., Any]
NEW = 16
PROMPTS = ([5], [61, 3, 88, 61, 3, 88, 61, 3, 5, 88])
ENDS = [7, 30, 41, 55, 60, 69, 71]
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.6},
    "repeated n-grams": {"no_repeat_ngram_size": 1},
    "the prompt's repetition": {"encoder_repetition_penalty": 3.0},
    "the prompt's n-grams": {"encoder_no_repeat_ngram_size": 1, "suppress_tokens": list(range(20, 96))},
    "bad words": {"bad_words_ids": [[65], [10, 69], [2, 10], [11, 11], [11, 3, 50]]},
    "least length": {"min_length": 14, "eos_token_id": ENDS},
    "least length of the new text": {"min_new_tokens": 9, "eos_token_id": ENDS},
    "suppressed": {"suppress_tokens": list(range(40))},
    "suppressed at the beginning": {"begin_suppress_tokens": list(range(80))},
    "bias": {"sequence_bias": [[[11], 4.0], [[12, 13], 6.0], [[11, 14], 5.0]]},
    "forced beginning": {"forced_bos_token_id": 17},
    "forced end": {"forced_eos_token_id": 19},
    "decay": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": ENDS},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5], [7, 9]],
        "min_new_tokens": 5,
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [3, 4],
        "remove_invalid_values": True,
        "renormalize_logits": True,
        "eos_token_id": ENDS,
    },
}


@pytest.fixture(scope="module")
def models(make_model: MakeModel, make_noisy: MakeModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target and its draft."""
    model = make_model("llama")
    return model, make_noisy(model, 0.02)


@pytest.fixture
def model(models: tuple[PreTrainedModel, PreTrainedModel]) -> Iterator[PreTrainedModel]:
    """The target, whose generation config may be changed."""
    usual_config = models[0].generation_config
    yield models[0]
    models[0].generation_config = usual_config


def written(model: PreTrainedModel, prompt: list[int], **more: Any) -> list[int]:
    """Continue a prompt by `generate()`."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **more}
    output = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **options)
    return cast(list[int], output[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def decoders(models: tuple[PreTrainedModel, PreTrainedModel]) -> list[tuple[Decoder[Any], Mapping[str, float]]]:
    """All kinds of them, lossless with these knobs."""
    model, draft = models
    pair = Pair(model, draft)
    heads = taught_heads(model, [[*prompt, *written(model, prompt, max_new_tokens=64)] for prompt in PROMPTS])
    return [
        (AutoregressiveDecoder(pair), {}),
        (SpeculativeDecoder(pair), {}),
        (SpeculativeDecoder(Pair(model, PromptLookupDrafter(96))), {}),
        (ThresholdDecoder(pair, 8, "never"), {"fallback": 0.0}),
        (LookaheadDecoder(pair), {}),
        (MedusaDecoder(pair, heads), {"tree_size": 12}),
        (DraftTreeDecoder(pair), {}),
        (DraftTreeDecoder(pair, "distinct"), {"node_budget": 8}),
    ]


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_text_is_that_of_generate(
    model: PreTrainedModel, decoders: list[tuple[Decoder[Any], Mapping[str, float]]], name: str
) -> None:
    ends = {"eos_token_id": SETTINGS[name].get("eos_token_id")}
    model.generation_config = GenerationConfig(**ends)
    without = [written(model, prompt) for prompt in PROMPTS]
    model.generation_config = GenerationConfig(**SETTINGS[name])
    expected = [written(model, prompt) for prompt in PROMPTS]
    assert without != expected
    for decoder, knobs in decoders:
        decoder.pair.eos_token_ids = frozenset(ends["eos_token_id"] or [])
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            generation = decoder.generate(prompt, max_new_tokens=NEW, knobs=knobs, seed=0)
            assert generation.tokens == tokens, (decoder.name, prompt)
            assert generation.divergence == 0


def test_what_is_sampled_from_is_what_generate_samples_from(model: PreTrainedModel) -> None:
    extra = {"min_p": 0.02, "typical_p": 0.9, "epsilon_cutoff": 0.003, "eta_cutoff": 0.002, "top_h": 0.9}
    for settings in (*({name: value} for name, value in extra.items()), {**extra, **SETTINGS["several"]}):
        # Temperature, top-k and top-p of the config are not asked.
        model.generation_config = GenerationConfig(do_sample=True, temperature=0.1, top_k=2, top_p=0.1, **settings)
        pair, sampling = Pair(model), Sampling(1.5, top_k=60, top_p=0.97)
        prompt = PROMPTS[1]
        output = cast(Any, model).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        text = output.sequences[0].tolist()
        rules = TextRules.of(pair, prompt, NEW, sampling)
        target = rules.target(pair.target)
        target.read(prompt[:-1])
        ours = rules.sampling.probabilities(target.forward(torch.tensor(text[len(prompt) - 1 : -1])).scores)
        theirs = torch.cat(list(output.scores)).softmax(-1)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        assert (sampling.probabilities(target.forward(torch.tensor(text[-1:])).scores) > 0).sum() > 8


@pytest.mark.parametrize("kind", ["lookahead", "tree", "medusa"])
def test_sampled_texts_of_trees_follow_the_target(make_table: MakeTable, kind: str) -> None:
    processors = [RepetitionPenaltyLogitsProcessor(1.5), NoBadWordsLogitsProcessor([[2], [0, 4]])]
    target = readable_table(6, seed=1, spread=1.2)
    pair = Pair(target, readable_table(6, seed=2))
    decoder: Decoder[Any] = LookaheadDecoder(pair)
    if kind == "tree":
        decoder = DraftTreeDecoder(pair, "distinct", max_candidates=2, max_depth=2)
    if kind == "medusa":
        from tests.helpers.small_medusa_heads import scripted_heads

        decoder = MedusaDecoder(pair, scripted_heads(target, [[1, 3, 0], [3, 1]]))
    assert_texts_follow_the_target(decoder, Sampling(), 400, usual, processors)


def test_no_settings_leave_a_text_to_the_model_alone(model: PreTrainedModel) -> None:
    neutral = GenerationConfig(
        repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0, typical_p=1.0, suppress_tokens=[], num_beams=1,
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, renormalize_logits=False, max_length=40, max_new_tokens=4,
    )  # fmt: skip
    pair = Pair(model, PromptLookupDrafter(96))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (neutral, GenerationConfig()):
            model.generation_config = config
            assert text_settings(model) == {}
            session = SpeculativeDecoder(pair).start(PROMPTS[1], max_new_tokens=NEW, sampling=Sampling(0.9))
            assert type(session.target) is type(pair.target)
            assert session.sampling == Sampling(0.9)
            assert type(session.sampling) is Sampling


@pytest.fixture(scope="module")
def worded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random model over the tokens of a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_text_ends_with_a_stop_string_where_generate_ends_it(
    worded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pair = Pair(worded, PromptLookupDrafter(len(tokenizer)), tokenizer)
    prompt = pair.encode("the spec of a token")
    unreadable = [token for token in range(len(tokenizer)) if not str(tokenizer.decode([token])).strip().isalpha()]
    settings = {"suppress_tokens": unreadable, "no_repeat_ngram_size": 2}
    worded.generation_config = GenerationConfig(**settings)
    plain = written(worded, prompt, max_new_tokens=24)
    for place in (4, 11, 17):
        string = str(tokenizer.decode(plain[place : place + 3]))[:-1]  # ends within a token, if that is a long one
        worded.generation_config = GenerationConfig(stop_strings=[string, "nowhere in it"], **settings)
        expected = written(worded, prompt, max_new_tokens=24, tokenizer=tokenizer)
        assert len(expected) <= place + 3
        for decoder in (AutoregressiveDecoder(pair), SpeculativeDecoder(pair), LookaheadDecoder(pair)):
            generation = cast(Decoder[Any], decoder).generate(prompt, max_new_tokens=24)
            assert (generation.tokens, generation.finish_reason) == (expected, "stop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not followed: .* that of one beam.* set it to None"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 .* one text"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 .* no contrastive search"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 .* no guidance"),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config=.* no watermark"),
        ({"token_healing": True}, "token_healing=True"),
        ({"force_words_ids": [[3]]}, "force_words_ids="),
        ({"max_time": 2.0}, "max_time=2.0 .* give max_new_tokens"),
        ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens=4 .* the text is the same"),
        ({"stop_strings": ["end"]}, "stop_strings=.* without a tokenizer"),
    ],
)
def test_what_is_not_followed_is_named_once(make_model: MakeModel, settings: dict[str, Any], message: str) -> None:
    model = make_model("gpt2", layers=1)
    for name, value in GenerationConfig(**settings).to_dict().items():
        if name in settings:
            setattr(model.generation_config, name, value)
    with pytest.warns(UserWarning, match=message):
        AutoregressiveDecoder(Pair(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LookaheadDecoder(Pair(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bad_words_ids": [[3], [400]]}, "bad_words_ids.*vocabulary size is 96"),
        ({"repetition_penalty": -2.0}, "repetition_penalty.*strictly positive"),
        ({"exponential_decay_length_penalty": (4, 1.3)}, "exponential_decay_length_penalty"),
        ({"min_p": 3.0}, "min_p"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_decoded(
    model: PreTrainedModel, settings: dict[str, Any], message: str
) -> None:
    model.generation_config = GenerationConfig()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"its generation_config asks for .*{message}"):
        AutoregressiveDecoder(Pair(model))


def test_processors_that_leave_no_token_are_named(make_table: MakeTable) -> None:
    decoder = AutoregressiveDecoder(Pair(make_table(4, seed=1)))
    with pytest.raises(NumericalError, match=r"NoRepeatNGramLogitsProcessor.* leave no token .* after 3 tokens"):
        decoder.generate([0], max_new_tokens=8, logits_processor=[NoRepeatNGramLogitsProcessor(1)])


@pytest.mark.parametrize("processors", [NoRepeatNGramLogitsProcessor(1), [None], "penalty", 3])
def test_what_is_no_list_of_processors_is_refused(make_table: MakeTable, processors: Any) -> None:
    with pytest.raises(ValueError, match="logits_processor must be a"):
        AutoregressiveDecoder(Pair(make_table(4, seed=1))).start([0], max_new_tokens=8, logits_processor=processors)


def test_a_recording_is_of_the_target_as_it_is_decoded(
    model: PreTrainedModel, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    pair = Pair(*models)
    prompt, plain, key = PROMPTS[1], target_digest(pair), fingerprint(pair)
    model.generation_config = GenerationConfig(repetition_penalty=1.6, no_repeat_ngram_size=2)
    decoder = SpeculativeDecoder(pair)
    generation = decoder.generate(prompt, max_new_tokens=40, knobs={"draft_length": 4})
    rows = Recorder(pair, Sampling(0.0), 4).record(prompt, generation.tokens, seed=0)
    assert rows["successor"][:, 0].tolist() == generation.tokens
    place = 0
    for round_ in generation.rounds:
        matches = rows["match"][place, : round_.drafted].tolist()
        assert round_.accepted == (matches.index(False) if False in matches else len(matches))
        place += len(round_.tokens)
    assert target_digest(pair) != plain
    assert fingerprint(pair) != key
    assert text_settings(model, place=True) == {}
    model.generation_config.min_new_tokens = 3
    assert list(text_settings(model, place=True)) == ["min_new_tokens"]
