"""Models as their owners hand them over: decoded as `generate` does, or refused with the reason and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, WhisperConfig, WhisperForConditionalGeneration

from specgym.decoding import AutoregressiveDecoder, LanguageModel, LookaheadDecoder, Pair, SpeculativeDecoder
from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.models.linear_layers import PrepackedLinear

MakeModel = Callable[..., PreTrainedModel]
Reference = Callable[..., list[list[int]]]
PROMPT = [5, 6, 7]


def texts(pair: Pair, count: int = 16) -> list[list[int]]:
    """Greedy texts of a pair by three decoders."""
    decoders = AutoregressiveDecoder(pair), SpeculativeDecoder(Pair(pair.target, pair.target)), LookaheadDecoder(pair)
    return [list(decoder.generate(PROMPT, max_new_tokens=count).tokens) for decoder in decoders]


def with_attention(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model whose configuration names an attention implementation, whether or not it is installed."""
    model.config._attn_implementation = name
    return model


def eight_bits(model: PreTrainedModel, threshold: float = 6.0) -> PreTrainedModel:
    """A model that says it was loaded by bitsandbytes in 8 bits."""
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return model


def adapted(model: PreTrainedModel, kind: str, **options: Any) -> Any:
    """A model wrapped by peft, in evaluation mode."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()


def lora(model: PreTrainedModel, **options: Any) -> Any:
    """A model with a LoRA adapter that changes its texts."""
    return adapted(model, "LoraConfig", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration on the meta device."""
    with torch.device("meta"):
        return type(model)._from_config(model.config)


def speech(_: PreTrainedModel) -> PreTrainedModel:
    """A small Whisper."""
    heads: Any = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, num_mel_bins=8, **heads)
    )


REFUSED: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "flex": (
        lambda model: with_attention(model, "flex_attention"),
        r"LlamaForCausalLM uses .* 'flex_attention', which compiles .*model\.set_attn_implementation\('sdpa'\)",
    ),
    "flash 2": (
        lambda model: with_attention(model, "flash_attention_2"),
        r"'flash_attention_2', which takes no mask but the causal one.*set_attn_implementation\('sdpa'\)",
    ),
    "flash 3 by a kernel": (
        lambda model: with_attention(model, "kernels-community/vllm-flash-attn3"),
        r"'kernels-community/vllm-flash-attn3', which takes no mask",
    ),
    "paged": (
        lambda model: with_attention(model, "paged|eager"),
        r"'paged\|eager', which is for continuous batching.*'sdpa'",
    ),
    "dynamic int8": (
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
        r"is quantised dynamically: its scales depend on all tokens.*Use the model before quantize_dynamic",
    ),
    "LLM.int8": (eight_bits, r"LLM\.int8, which .* outlier.*load_in_4bit=True.*llm_int8_threshold=0\.0"),
    "adapter": (
        lora,
        r"is a PeftModelForCausalLM, .*Pair\(model\.merge_and_unload\(\)\).*Pair\(model\.get_base_model\(\)\)",
    ),
    "virtual tokens": (
        lambda model: adapted(model, "PromptTuningConfig", num_virtual_tokens=3),
        r"puts virtual tokens before every text.*Train a LoRA adapter",
    ),
    "late adapter": (
        lambda model: lora(model, alora_invocation_tokens=[5, 6]),
        r"has the adapter 'default', which works from its invocation tokens on \(aLoRA\)",
    ),
    "late adapter, inside": (
        lambda model: lora(model, alora_invocation_tokens=[5, 6]).get_base_model(),
        r"LlamaForCausalLM has the adapter 'default', which works from its invocation tokens on \(aLoRA\)",
    ),
    "compiled": (torch.compile, r"is a compiled module \(OptimizedModule\).*Pair\(model\._orig_mod\)"),
    "wrapped": (nn.DataParallel, r"is a model in a DataParallel.*Pair\(model\.module\)"),
    "meta": (without_weights, r"has no weights: model\.embed_tokens\.weight is on the meta device.*from_pretrained"),
    "speech": (speech, r"has an encoder that reads input_features, and specgym gives it tokens.*such as T5, BART"),
    "no transformer": (
        lambda model: nn.Linear(2, 2),
        r"a transformers model, not a Linear; load one by name with load_pair",
    ),
}


ROUNDED_BY_THE_PASS = ("dynamic int8", "LLM.int8")
"""Taken for drafts (`test_quantise.py`)."""


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_decoded_is_refused_when_a_pair_is_made(make_model: MakeModel, kind: str) -> None:
    build, message = REFUSED[kind]
    model = build(make_model("llama"))
    model.train()
    makes: list[Callable[[Any], object]] = [Pair, LanguageModel]
    if kind not in ROUNDED_BY_THE_PASS:
        makes.append(lambda draft: Pair(make_model("llama"), draft))
    for make in makes:
        with pytest.raises(UnsupportedModelError, match=message):
            make(model)
    assert model.training


def test_what_is_no_model_at_all_is_refused() -> None:
    target: Any = "facebook/opt-125m"
    with pytest.raises(UnsupportedModelError, match="a target is a transformers model, not a str; load one by name"):
        Pair(target)


def test_llm_int8_without_outliers_is_not_refused(make_model: MakeModel) -> None:
    Pair(eight_bits(make_model("llama"), threshold=0.0))


def _without_cache(model: PreTrainedModel) -> None:
    model.config.use_cache = False


def _static_cache(model: PreTrainedModel) -> None:
    assert model.generation_config is not None
    model.generation_config.cache_implementation = "static"


def _training(model: PreTrainedModel) -> None:
    model.config.attention_dropout = 0.5
    model.gradient_checkpointing_enable()
    model.train()


def _offloaded(model: PreTrainedModel) -> None:
    accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [_without_cache, _static_cache, _training, _offloaded],
    ids=lambda change: change.__name__,
)
def test_however_a_model_is_set_up_its_texts_are_those_of_generate(
    make_model: MakeModel, reference: Reference, change: Callable[[PreTrainedModel], None]
) -> None:
    expected = reference(make_model("llama"), [PROMPT], 16) * 3
    model = make_model("llama")
    change(model)
    assert texts(Pair(model)) == expected
    assert reference(model, [PROMPT], 16) == expected[:1]


def test_a_model_that_is_partly_on_the_disk_is_decoded_and_its_absent_layers_left_alone(
    make_model: MakeModel, reference: Reference, tmp_path: Path
) -> None:
    model = make_model("llama", hidden=512, layers=2, vocabulary=128, spread=0.1)
    expected = reference(model, [PROMPT], 8) * 3
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    dispatched = accelerate.dispatch_model(
        model, {**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path
    )
    assert texts(Pair(dispatched), 8) == expected
    assert not any(isinstance(layer, PrepackedLinear) for layer in dispatched.get_submodule("model.layers.1").modules())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoraConfig", {"target_modules": ["q_proj"]}),
        ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}),
    ],
    ids=["lora", "ia3"],
)
def test_a_model_inside_its_adapter_is_decoded_with_it(
    make_model: MakeModel, kind: str, options: dict[str, Any]
) -> None:
    wrapper = adapted(make_model("llama"), kind, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapper.named_parameters():
            if "lora" in name or "ia3" in name:
                weight.add_(torch.randn(weight.shape))
    ids = torch.tensor([PROMPT])
    text = wrapper.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert texts(Pair(wrapper.get_base_model())) == [text[0, 3:].tolist()] * 3


def test_another_default_type_changes_nothing(make_model: MakeModel, reference: Reference) -> None:
    model = make_model("llama")
    expected = reference(model, [PROMPT], 16) * 3
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert texts(Pair(model)) == expected
    finally:
        torch.set_default_dtype(usual)


def test_attention_that_is_switched_after_the_pair_is_followed_or_refused(
    make_model: MakeModel, reference: Reference
) -> None:
    model = make_model("llama")
    expected = reference(model, [PROMPT], 16) * 3
    pair = Pair(model)
    model.set_attn_implementation("eager")
    assert texts(pair) == expected
    with_attention(model, "flash_attention_2")
    with pytest.raises(UnsupportedModelError, match=r"set_attn_implementation\('sdpa'\)"):
        texts(pair)
    model.set_attn_implementation("sdpa")
    assert texts(pair) == expected


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantisation_in_place_after_the_pair_is_refused_at_the_start_of_a_text(make_model: MakeModel) -> None:
    model = make_model("llama")
    pair = Pair(model)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    with pytest.raises(UnsupportedModelError, match="is quantised dynamically"):
        texts(pair)


def test_training_and_moves_after_the_pair_are_refused_at_the_start_of_a_text(
    make_model: MakeModel, reference: Reference
) -> None:
    model = make_model("llama")
    expected = reference(model, [PROMPT], 16) * 3
    pair = Pair(model)
    model.gradient_checkpointing_enable()
    for part in (model, model.get_submodule("model.layers.1")):
        part.train()
        with pytest.raises(UnsupportedModelError, match=r"in training mode.*Call model\.eval\(\) before decoding"):
            texts(pair)
        model.eval()
    assert texts(pair) == expected
    model.double()
    with pytest.raises(UnsupportedModelError, match=r"is torch\.float64 on cpu now, and was torch\.float32.*new Pair"):
        texts(pair)
    assert texts(Pair(model)) == expected
