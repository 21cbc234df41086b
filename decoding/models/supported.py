"""Which models can be decoded speculatively, and the reason and the way out for those that cannot.

`causal_model` looks at what somebody hands over; `refuse_unsupported` at a model's configuration, layers and weights
when a pair is made, before anything is changed; `require_ready` at what its owner may have switched since, at the start
of every text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .linear_layers import only_looking

_ANOTHER_MODEL = "Choose a causal LM such as Llama, Qwen2, OPT, GPT-2, GPT-NeoX, Phi or Mistral."
_ATTENTION: dict[str, str] = {
    # transformers 5.23, integrations/flex_attention.py: compiled per shape of mask, and a draft's differs every round.
    "flex": "compiles a kernel for the mask of every draft and fails on many of their shapes",
    # transformers 5.23, modeling_flash_attention_utils.py: of a mask it reads which tokens are padding, nothing else.
    "flash": "takes no mask but the causal one, so that branches of drafts would see each other",
    # transformers 5.23, integrations/eager_paged.py.
    "paged|": "is for continuous batching and wants its paged cache",
}
"""Parts of the names of attention implementations that are refused, with what each does."""
_KINDS: dict[str, str] = {  # by `model_type`; transformers 5.23, their modeling files
    "cpmant": "puts prompt tokens of its own before every text",
    "nllb-moe": "drops tokens where an expert has too many in a pass, so that a draft changes the scores before it",
    "switch_transformers": "drops tokens where an expert has too many in a pass, so that a draft changes those before",
    "minimax": "keeps its cache in a class of its own, of which nothing can be taken back",
    "recurrent_gemma": "keeps its states in its layers, not in the cache, so that none can be saved",
    "rwkv": "keeps its states in lists of its own, not in a cache",
    "xlstm": "keeps its cache in a class of its own, of which nothing can be taken back",
}
"""Reasons for which whole kinds of models are refused."""
_ENCODERS: dict[str, str] = {
    "bigbird_pegasus": "changes its encoder for good when it reads a short source, so that texts go by those before",
}
"""Reasons for which kinds of models are refused that have an encoder; their decoders alone are not."""


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that makes a model with a language modelling head of a configuration."""
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def causal_model(model: object, role: str = "target") -> PreTrainedModel:
    """Return what somebody handed over as a model, if it is a transformers model as it stands.

    Args:
        model: anything.
        role: what it was meant to be, for the message.

    Raises:
        UnsupportedModelError: it is no model, or one in a wrapper; the message says how to take it out.
    """
    if isinstance(model, PreTrainedModel):
        return model
    kind = type(model).__name__
    inner: Any = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):  # torch.compile gives such a wrapper
        raise UnsupportedModelError(
            f"the {role} is a compiled module ({kind}), and passes over drafts have another shape every round, for "
            f"each of which it would be compiled anew. Give the model itself: Pair(model._orig_mod)"
        )
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise _refusal_of_adapter(model, role)
    if isinstance(getattr(model, "module", None), PreTrainedModel):  # DataParallel and its kin
        raise UnsupportedModelError(f"the {role} is a model in a {kind}. Give the model itself: Pair(model.module)")
    raise UnsupportedModelError(
        f"a {role} is a transformers model, not a {kind}; load one by name with load_pair, or with "
        "AutoModelForCausalLM.from_pretrained"
    )


def _refusal_of_adapter(model: Any, role: str) -> UnsupportedModelError:
    _refuse_late_adapters(model.get_base_model())
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return UnsupportedModelError(
            f"the {role} is a {type(model).__name__} that puts virtual tokens before every text, which specgym does "
            "not do. Train a LoRA adapter instead, or decode the model without it: Pair(model.get_base_model())"
        )
    return UnsupportedModelError(
        f"the {role} is a {type(model).__name__}, a wrapper around a model with an adapter. Merge the adapter, "
        "Pair(model.merge_and_unload()), or give the model inside, whose layers keep the adapter at work: "
        "Pair(model.get_base_model())"
    )


def refuse_unsupported(model: PreTrainedModel, exact: bool = True) -> None:
    """Refuse a model that is known to be decoded wrongly or not at all.

    Args:
        model: to be decoded.
        exact: whether its scores of a token may not depend on what else a pass reads, as a target's may not.

    Raises:
        UnsupportedModelError: naming the model, the reason and the way out.
    """
    kind = type(model).__name__
    reads, encodes = getattr(model, "main_input_name", "input_ids"), getattr(model.config, "is_encoder_decoder", False)
    if encodes and reads != "input_ids":
        raise UnsupportedModelError(
            f"{kind} has an encoder that reads {reads}, and specgym gives it tokens. Choose an encoder-decoder that "
            "reads and writes text, such as T5, BART, Marian or Pegasus"
        )
    reason = {**_KINDS, **(_ENCODERS if encodes else {})}.get(getattr(model.config, "model_type", ""))
    if getattr(model.config, "model_type", "") == "doge" and model.config.is_moe:
        reason = "routes the tokens of a pass together, so that a draft changes the scores of what is before it"
    if reason is None and not {"past_key_values", "cache_params"} & set(signature(model.forward).parameters):
        reason = "keeps no cache of keys and values (its forward takes no past_key_values)"
    if reason is not None:
        raise UnsupportedModelError(f"{kind} {reason}; its drafts cannot be checked. {_ANOTHER_MODEL}")
    _refuse_attention(model)
    _refuse_absent_weights(model)
    if exact:
        _refuse_dynamic_scales(model, model.modules())
        if any(getattr(layer, "rounds_inputs", False) for layer in model.modules()):
            raise UnsupportedModelError(
                f"{kind} is quantised to int8 with its inputs, so as a target it would give a draft that is checked in "
                "one pass other scores than token by token. Take the model before it was quantised, or this for a draft"
            )
    _refuse_late_adapters(model)


def require_ready(model: PreTrainedModel, dtype: torch.dtype, device: torch.device, exact: bool = True) -> None:
    """Refuse a text while its model is switched to something that decodes wrongly; cheap, for the start of each text.

    Args:
        model: as its owner left it.
        dtype: that it had when its pair was made.
        device: likewise.
        exact: see `refuse_unsupported`.

    Raises:
        UnsupportedModelError: the model is in training mode, was moved or quantised, or has an attention implementation
            that takes no trees.
    """
    modules = list(model.modules())
    _refuse_attention(model)
    if exact:
        _refuse_dynamic_scales(model, modules)
    with only_looking():
        place = model.dtype, execution_device(model)
    if place != (dtype, device):
        raise UnsupportedModelError(
            f"{type(model).__name__} is {place[0]} on {place[1]} now, and was {dtype} on {device} when its pair was "
            "made. Make a new Pair of it"
        )
    if any(module.training for module in modules) and _is_in_training(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is in training mode, in which dropout changes its texts and gradient "
            "checkpointing drops its cache. Call model.eval() before decoding"
        )


def _is_in_training(model: PreTrainedModel) -> bool:
    """True if any part is that does something else then; a parametrization begins so, and does the same in both."""
    training = (name.split(".") for name, module in model.named_modules() if module.training)
    return any("parametrizations" not in names for names in training)


def _refuse_attention(model: PreTrainedModel) -> None:
    for config in (model.config, model.config.get_text_config(decoder=True)):
        name = str(getattr(config, "_attn_implementation", ""))
        for part, reason in _ATTENTION.items():
            if part in name:
                raise UnsupportedModelError(
                    f"{type(model).__name__} uses the attention implementation {name!r}, which {reason}. Set another: "
                    "model.set_attn_implementation('sdpa'), or 'eager'"
                )


def _offloading(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate that fetch a module's weights for the time of its pass."""
    hook: Any = getattr(module, "_hf_hook", None)
    return (item for item in getattr(hook, "hooks", (hook,)) if getattr(item, "offload", False))


def _refuse_absent_weights(model: PreTrainedModel) -> None:
    with only_looking():
        absent = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if absent is not None and not any(next(_offloading(module), None) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights: {absent} is on the meta device. Load it with "
            "AutoModelForCausalLM.from_pretrained, or give it weights with load_state_dict(..., assign=True)"
        )


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device that a model reads tokens on, also where its weights are elsewhere between passes."""
    if model.device.type != "meta":
        return model.device
    hooks = (hook for module in model.modules() for hook in _offloading(module))
    device = next((hook.execution_device for hook in hooks if hook.execution_device is not None), "cpu")
    return torch.device(device)


def _refuse_dynamic_scales(model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    scales = dynamic_scales(model, modules)
    if scales is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is {scales.what}, so as a target it would give a draft that is checked in one "
            f"pass other scores than token by token. {scales.way_out}, or take it for a draft"
        )


class DynamicScales(NamedTuple):
    """Arithmetic in which a token's scores depend on the tokens that are read in the same pass."""

    what: str
    way_out: str


def dynamic_scales(model: PreTrainedModel, modules: Iterable[nn.Module]) -> DynamicScales | None:
    """Return what makes a token's scores depend on the tokens that are read in the same pass; None without it.

    torch's dynamic quantisation has a scale for the whole input of a layer (torch 2.13,
    ao/nn/quantized/dynamic/modules/linear.py). LLM.int8 has one for every token, but keeps those features apart in
    which any token of the pass has an outlier (bitsandbytes, backends/default/ops.py), unless its threshold is 0.
    """
    if any(map(is_dynamic, modules)):
        return DynamicScales(
            "quantised dynamically: its scales depend on all tokens that a pass reads",
            "Use the model before quantize_dynamic, in float32 or bfloat16",
        )
    options: Any = getattr(model.config, "quantization_config", None)
    options = options if isinstance(options, dict) else vars(options) if options is not None else {}
    eight_bits = options.get("load_in_8bit", options.get("_load_in_8bit", False))
    if eight_bits and options.get("llm_int8_threshold", 6.0) > 0:
        return DynamicScales(
            "quantised with LLM.int8, which treats the features apart in which any token of a pass has an outlier",
            "Load it with BitsAndBytesConfig(load_in_4bit=True), with llm_int8_threshold=0.0, or in bfloat16",
        )
    return None


def is_dynamic(module: nn.Module) -> bool:
    """True for a layer that torch has quantised dynamically."""
    dynamic = ("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic")
    return type(module).__module__.startswith(dynamic)


def _refuse_late_adapters(model: nn.Module) -> None:
    adapters: Any = getattr(model, "peft_config", None)
    for name, adapter in adapters.items() if isinstance(adapters, dict) else ():
        if getattr(adapter, "alora_invocation_tokens", None) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has the adapter {name!r}, which works from its invocation tokens on (aLoRA), "
                "as only PeftModel.generate does. Train a plain LoRA adapter instead"
            )


# OpenMP's threads do not survive a fork, by which Gymnasium's asynchronous vector environments start on Linux: a child
# whose parent has used them waits for ever at its first wide operation. So children decode with one thread each.
_threads_of_parent: int | None = None


def decoding_threads() -> int:
    """Return the CPU threads of decoding here; in a forked child its parent's, so that both share a latency profile."""
    return _threads_of_parent or torch.get_num_threads()


def _use_one_thread() -> None:
    global _threads_of_parent
    _threads_of_parent = decoding_threads()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_use_one_thread)
