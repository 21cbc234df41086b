"""Trials behind windows and switches on small copies of configurations, and what is settled by them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from specgym.decoding import UnsupportedModelError
from specgym.decoding.models import trial
from specgym.decoding.models.attention import Span
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.shrink import CONTEXT, shrunken

MakeModel = Callable[..., PreTrainedModel]
DECLARING = (
    "Cohere2Config",
    "Exaone4Config",
    "GPTNeoConfig",
    "Gemma2Config",
    "Gemma3TextConfig",
    "GptOssConfig",
    "Llama4TextConfig",
    "LlamaConfig",
    "MistralConfig",
    "MixtralConfig",
    "Olmo3Config",
    "Phi3Config",
    "Qwen2Config",
    "Qwen3Config",
    "SmolLM3Config",
    "Starcoder2Config",
)
"""Configurations whose defaults are those of a real model, most with windows, chunks or switches."""


@pytest.mark.parametrize("name", DECLARING)
def test_real_sizes_shrink_to_a_small_model(name: str) -> None:
    config: PreTrainedConfig = getattr(transformers, name)()
    before = copy.deepcopy(config.to_dict())
    small = shrunken(config)
    assert small is not None
    assert small.max_position_embeddings == CONTEXT
    assert set(getattr(small, "layer_types", None) or ()) == set(getattr(config, "layer_types", None) or ())
    model = transformers.AutoModelForCausalLM.from_config(small)
    assert sum(weight.numel() for weight in model.parameters()) < 200_000
    assert config.to_dict() == before


def windowed(make_model: MakeModel) -> PreTrainedModel:
    return make_model("mistral", context=96, sliding_window=20)


def test_a_window_that_the_configuration_hides_is_noticed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks that are wrong beyond a window show so in no trial of six tokens, but on the small copy."""
    monkeypatch.setattr(trial, "declared_spans", lambda model, config: ([{"": Span()}], ""))
    monkeypatch.setattr(trial, "_small_models", {})
    model = LanguageModel(windowed(make_model))
    assert not model.branches
    assert "small copy" in model.why_no_branches


def test_a_model_that_cannot_be_tried_behind_its_window_ends_there_and_says_so(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trial, "shrunken", lambda config: None)
    with caplog.at_level(logging.WARNING, "specgym"):
        model = LanguageModel(windowed(make_model))
    assert model.branches
    assert model.context_limit == 20
    assert "its context ends there, after 20 tokens" in caplog.text


def test_a_trial_leaves_random_numbers_and_the_configuration_alone(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_small_models", {})
    model = windowed(make_model)
    before = copy.deepcopy(model.config.to_dict())
    state = torch.get_rng_state()
    LanguageModel(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == before


def test_a_small_model_is_tried_once(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_small_models", {})
    LanguageModel(windowed(make_model))
    monkeypatch.setattr(trial, "_made", lambda *_: pytest.fail("made again"))
    LanguageModel(windowed(make_model))


@pytest.mark.parametrize(("kind", "layers"), [("llama", 1), ("llama", 2), ("mistral", 2)])
def test_a_draft_of_its_targets_kind_is_tried_with_it(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, kind: str, layers: int
) -> None:
    monkeypatch.setattr(trial, "_small_models", {})
    target, draft = make_model(kind), make_model(kind, layers=layers)
    for model, name in ((target, "somewhere/target"), (draft, "elsewhere/draft")):
        model.config.name_or_path = name
    LanguageModel(target)
    monkeypatch.setattr(trial, "_made", lambda *_: pytest.fail("made again"))
    LanguageModel(draft, role="draft")


def test_a_model_whose_cache_does_nothing_is_refused(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_model("llama")
    stock = model.forward
    model.forward = lambda input_ids, attention_mask=None, position_ids=None, past_key_values=None, **keywords: stock(
        input_ids, use_cache=False
    )
    monkeypatch.setattr(trial, "shrunken", lambda config: None)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot be decoded speculatively: it"):
        LanguageModel(model)


def recurrent() -> LanguageModel:
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        full_attn_idxs=[1, 3],
        initializer_range=0.2,
    )
    return LanguageModel(transformers.Lfm2ForCausalLM(config))


def test_tokens_of_a_recurrent_model_are_taken_back_wherever_they_began() -> None:
    model = recurrent()
    assert model.restores_states
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 96, (60,), generator=generator)
    with torch.inference_mode():
        expected = model.model(input_ids=text.unsqueeze(0), use_cache=False).logits[0]
    model.read(text[:9].tolist())
    place = 9
    for drafted, accepted in ((4, 1), (6, 0), (3, 3), (5, 2), (1, 1), (16, 12), (2, 0), (7, 3), (4, 4)):
        wrong = torch.randint(0, 96, (drafted - accepted,), generator=generator)
        read = torch.cat([text[place : place + accepted], wrong])
        scores = model.forward(read).scores
        torch.testing.assert_close(scores[:accepted], expected[place : place + accepted], atol=1e-4, rtol=1e-4)
        place += accepted
        model.truncate(place)
        assert model.length == place
    model.truncate(3)  # long before the states that are saved
    scores = model.forward(text[3:8], rows=torch.tensor([0, 4])).scores
    torch.testing.assert_close(scores, expected[[3, 7]], atol=1e-4, rtol=1e-4)
