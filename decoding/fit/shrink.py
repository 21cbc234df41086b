"""A draft from a target: fewer of its layers with its embeddings, or a small fresh model of the same kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .errors import FitError

# Where the architectures of transformers keep their layers, most common first.
_LAYERS = ("model.layers", "transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.language_model.layers")


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's layers.

    Raises:
        FitError: if the architecture keeps them somewhere else; the message names it.
    """
    for name in _LAYERS:
        found: object = model
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return name, found
    raise FitError(
        f"{type(model).__name__} keeps its layers in none of {', '.join(_LAYERS)}: use a fresh draft (--hidden) instead"
    )


def spread(layers: int, of: int) -> list[int]:
    """Which layers a draft takes when not told: the first, the last, and evenly between them.

    Raises:
        FitError: if ``layers`` is not between 1 and ``of``.
    """
    if not 1 <= layers <= of:
        raise FitError(f"a draft can take 1 to {of} layers of this target, not {layers}")
    if layers == 1:
        return [0]
    return [round(i * (of - 1) / (layers - 1)) for i in range(layers)]


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that embed tokens and positions and turn hidden states into logits."""
    modules = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    _, layers = layers_of(model)
    inside = {id(module) for module in layers.modules()}
    # Learned positions (GPT-2, OPT) are embeddings beside the layers.
    modules |= {id(m) for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside}
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if id(module) in modules
        for parameter, _ in module.named_parameters(recurse=False)
    ]


def take_layers(target: PreTrainedModel, chosen: Sequence[int]) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model of the same architecture with copies of some of the target's layers and its very embeddings.

    Args:
        target: the model to take from; not changed.
        chosen: indices of the layers, in the order in which the draft runs them.

    Returns:
        The draft, in float32, with everything outside the layers copied except the embeddings, which are the target's
        own parameters; and the names of those, here and there, as ``save_checkpoint`` takes them.

    Raises:
        FitError: if the architecture is not supported, or an index does not exist.
    """
    name, layers = layers_of(target)
    if bad := [index for index in chosen if not 0 <= index < len(layers)]:
        raise FitError(f"the target has layers 0 to {len(layers) - 1}, not {bad[0]}")
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(chosen)
    # Per-layer lists of the configuration follow the layers they describe.
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(layers) and key != "architectures":
            setattr(config, key, [value[index] for index in chosen])
    with torch.random.fork_rng(devices=[]):
        draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _, own = layers_of(draft)
    if len(own) != len(chosen):
        raise FitError(f"{type(target).__name__} ignores num_hidden_layers: use a fresh draft (--hidden) instead")
    weights = {}
    for key, tensor in target.state_dict().items():
        rest = key.removeprefix(f"{name}.")
        if rest == key:
            weights[key] = tensor
        else:
            index, _, tail = rest.partition(".")
            weights |= {f"{name}.{place}.{tail}": tensor for place, i in enumerate(chosen) if i == int(index)}
    draft.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    held, shared = target.state_dict(keep_vars=True), dict[int, str]()
    for key in embedding_names(target):
        owner, _, attribute = key.rpartition(".")
        setattr(draft.get_submodule(owner), attribute, held[key])
        # Tied embeddings are one parameter with two names; checkpoints store it under the first.
        shared.setdefault(id(held[key]), key)
    return draft, {key: key for key in shared.values()}


def fresh(
    target: PreTrainedModel, layers: int, hidden: int, heads: int | None = None, seed: int = 0
) -> PreTrainedModel:
    """A small Llama with random weights, tied embeddings, and the target's vocabulary and separator.

    Args:
        target: whose vocabulary and context length to take.
        layers: number of layers.
        hidden: width of the hidden state.
        heads: attention heads; None for one of 32 to 64 numbers each.
        seed: of the weights.

    Raises:
        FitError: if ``hidden`` cannot be divided among the heads.
    """
    source = target.config.get_text_config()
    heads = heads or max(1, hidden // 64) + (hidden < 128)
    if hidden % (2 * heads):
        raise FitError(f"--hidden {hidden} cannot be divided among {heads} heads of an even size; give --heads")
    config: PreTrainedConfig = AutoConfig.for_model(
        "llama",
        # The embedding may have more rows than the tokeniser has tokens; logits must line up with the target's.
        vocab_size=target.get_output_embeddings().weight.shape[0],
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=getattr(source, "max_position_embeddings", 2048),
        tie_word_embeddings=True,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        rms_norm_eps=1e-5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
