"""A draft before training: some of the target's layers with its embeddings, or a small fresh model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from ...errors import FitError
from ...models.encoder.encoder_decoder import has_encoder
from ...models.supported import auto_class

# Paths of the layers in the architectures of transformers, most common first.
_LAYERS = (
    "model.layers",
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.language_model.layers",
    "decoder.block",
    "led.decoder.layers",
)
_COUNTS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
"""Numbers of layers in configurations: beside an encoder, the decoder's (T5, BART and its kin)."""
# Linear layers into the neurons of a feed-forward part and out of them: Llama and its kin, GPT-NeoX, OPT and Phi.
_FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc1",), "fc2"),
)
_WIDTHS = ("intermediate_size", "ffn_dim", "decoder_ffn_dim")


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's layers, beside an encoder those of its decoder.

    Raises:
        FitError: if the architecture keeps them somewhere else; the message names it.
    """
    for name in _LAYERS:
        module: object = model
        for part in name.split("."):
            module = getattr(module, part, None)
        if isinstance(module, nn.ModuleList):
            return name, module
    way_out = "use another draft" if has_encoder(model) else "use a fresh draft (--hidden) instead"
    raise FitError(f"{type(model).__name__} keeps its layers in none of {', '.join(_LAYERS)}: {way_out}")


def spread(layers: int, total: int) -> list[int]:
    """Default choice of layers: the first, the last, and evenly between them.

    Raises:
        FitError: if ``layers`` is not between 1 and ``total``.
    """
    if not 1 <= layers <= total:
        raise FitError(f"a draft can take 1 to {total} layers of this target, not {layers}")
    if layers == 1:
        return [0]
    return [round(i * (total - 1) / (layers - 1)) for i in range(layers)]


def lent_names(model: PreTrainedModel) -> list[str]:
    """Names of what a draft has from its target as it is: all that embeds tokens and positions, that turns hidden
    states into logits, and the encoder, if there is one."""
    modules = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    _, layers = layers_of(model)
    inside = {id(module) for module in layers.modules()}
    # Learned positions (GPT-2, OPT) are embeddings beside the layers.
    modules |= {id(m) for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside}
    if has_encoder(model):
        encoder: Any = model.get_encoder()
        modules |= {id(model), *map(id, encoder.modules())}  # BART has a bias of its logits beside all layers
    of_modules = {
        ".".join(filter(None, (name, key)))
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in modules
        for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    return [name for name in model.state_dict() if name in of_modules]


def take_layers(target: PreTrainedModel, chosen: Sequence[int]) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model of the same architecture with copies of some of the target's layers, and its very embeddings and encoder.

    Args:
        target: the model to take from; not changed.
        chosen: indices of the layers, beside an encoder of the decoder's, in the order in which the draft runs them.

    Returns:
        The draft, in float32, with everything outside the layers copied except the embeddings and an encoder, which are
        the target's own parameters; and the names of those, here and there, as ``save_checkpoint`` takes them.

    Raises:
        FitError: if the architecture is not supported, or an index does not exist.
    """
    name, layers = layers_of(target)
    if bad := [index for index in chosen if not 0 <= index < len(layers)]:
        raise FitError(f"the target has layers 0 to {len(layers) - 1}, not {bad[0]}")
    config = copy.deepcopy(target.config)
    part: Any = getattr(config, "decoder", None)
    part = part if isinstance(part, PreTrainedConfig) else config  # T5Gemma has one for each
    count = next((key for key in _COUNTS if key in vars(part)), _COUNTS[-1])
    setattr(part, count, len(chosen))
    # Per-layer lists of the configuration follow the layers they describe, unless those may be the encoder's.
    for key, value in list(vars(part).items()) if part is not config or not has_encoder(target) else ():
        if isinstance(value, list) and len(value) == len(layers) and key != "architectures":
            setattr(part, key, [value[index] for index in chosen])
    with torch.random.fork_rng(devices=[]):
        draft: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    if len(layers_of(draft)[1]) != len(chosen):
        way_out = "use another draft" if has_encoder(target) else "use a fresh draft (--hidden) instead"
        raise FitError(f"{type(target).__name__} ignores {count}: {way_out}")
    held, weights = target.state_dict(keep_vars=True), dict[str, Tensor]()
    for key in draft.state_dict():
        place, _, tail = key.removeprefix(f"{name}.").partition(".")
        there = f"{name}.{chosen[int(place)]}.{tail}" if key.startswith(f"{name}.") else key
        # The first layer of a T5 alone has the bias of positions, which all others use.
        weights[key] = held[there if there in held else f"{name}.0.{tail}"].float()
    draft.load_state_dict(weights)
    shared = dict[int, str]()
    for key in lent_names(target):
        owner, _, attribute = key.rpartition(".")
        setattr(draft.get_submodule(owner), attribute, held[key])
        # Tied embeddings are one parameter with two names; checkpoints store it under the first.
        shared.setdefault(id(held[key]), key)
    return draft, {key: key for key in shared.values()}


def fresh(
    target: PreTrainedModel, layers: int, hidden: int, heads: int | None = None, seed: int = 0
) -> PreTrainedModel:
    """A small Llama with random weights, tied embeddings, and the target's vocabulary, context and separator.

    Without a number of heads, they have a width of 32 to 64.

    Raises:
        FitError: if ``hidden`` cannot be divided among the heads.
    """
    source = target.config.get_text_config()
    heads = heads or max(1, hidden // 64) + (hidden < 128)
    if hidden % (2 * heads):
        raise FitError(f"--hidden {hidden} cannot be divided among {heads} heads of an even size; give --heads")
    return small_llama(
        seed,
        source,
        # The embedding may have more rows than the tokeniser has tokens; logits must line up with the target's.
        vocab_size=target.get_output_embeddings().weight.shape[0],
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=getattr(source, "max_position_embeddings", 2048),
    )


def small_llama(seed: int, special: Any, **shape: Any) -> LlamaForCausalLM:
    """A Llama with random weights, tied embeddings and the special tokens of a configuration or tokeniser; float32."""
    config = LlamaConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        **{name: getattr(special, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def feed_forward_width(model: PreTrainedModel) -> int:
    """Number of neurons in the feed-forward part of every layer.

    Raises:
        FitError: the parts are not linear layers with known names, or layers differ; the message names the
            architecture.
    """
    widths = {outward.in_features for _, outward in map(_feed_forward, layers_of(model)[1])}
    if len(widths) != 1 or getattr(model.config, _width_name(model)) not in widths:
        raise FitError(f"the layers of {type(model).__name__} are not equally wide: leave out --intermediate")
    return int(widths.pop())


def narrow(model: PreTrainedModel, width: int) -> None:
    """Keep the ``width`` strongest neurons of every layer's feed-forward part, in place.

    The strength of a neuron is the product of the norms of the weights that lead into it and out of it: what it can add
    to the hidden state is at most in proportion to that. The others are cut out, as in structured pruning (LLM-Pruner,
    Ma et al., arXiv 2305.11627), and training makes up for them.

    Raises:
        FitError: as for `feed_forward_width`, or the width is out of range.
    """
    present = feed_forward_width(model)
    if not 1 <= width <= present:
        raise FitError(f"--intermediate must be 1 to {present}, the neurons in the target's layers, got {width}")
    for layer in layers_of(model)[1]:
        inward, outward = _feed_forward(layer)
        strength = outward.weight.detach().norm(dim=0)
        for part in inward:
            strength = strength * part.weight.detach().norm(dim=1)
        kept = strength.topk(width).indices.sort().values
        for part in inward:
            _set(part, part.weight[kept], None if part.bias is None else part.bias[kept])
        _set(outward, outward.weight[:, kept], outward.bias)
    setattr(model.config, _width_name(model), width)


def _feed_forward(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """The linear layers that lead into a layer's neurons, and the layer that leads out of them."""
    for owner in (getattr(layer, "mlp", None), layer):
        for names, name in _FEED_FORWARD:
            inward, outward = [getattr(owner, part, None) for part in names], getattr(owner, name, None)
            linear = [part for part in inward if isinstance(part, nn.Linear)]
            if len(linear) == len(names) and isinstance(outward, nn.Linear):
                return linear, outward
    known = ", ".join("/".join((*names, name)) for names, name in _FEED_FORWARD)
    raise FitError(
        f"{type(layer).__name__} has no feed-forward part of linear layers {known}: leave out --intermediate"
    )


def _width_name(model: PreTrainedModel) -> str:
    for name in _WIDTHS:
        if isinstance(getattr(model.config, name, None), int):
            return name
    raise FitError(
        f"the configuration of {type(model).__name__} has no {' or '.join(_WIDTHS)}: leave out --intermediate"
    )


def _set(part: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    part.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().clone())
    part.out_features, part.in_features = weight.shape
