"""EAGLE heads as files: safetensors for the weights, JSON for the rest, and a probe that tells one target from another.

Public EAGLE-3 heads are read, too: a folder with ``config.json`` (that of the layer, with ``draft_vocab_size``, or one
with ``speculators_model_type`` and ``transformer_layer_config``) and ``model.safetensors`` or ``pytorch_model.bin``,
whose tensors are called ``fc.weight``, ``midlayer.*`` or ``layers.0.*``, ``norm.weight``, ``lm_head.weight``, ``d2t``
(to be added to the number of a token among those that the head proposes, which gives the target's), ``t2d`` and
``embed_tokens.weight``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...files import replacing, write_text
from ...loading.checkpoint import pack, unpack
from ...loading.presets import EAGLE, head_folder, public_head
from ...models.identity import alike, probe
from ...models.language_model import LanguageModel
from ...models.output_layer import output_layer
from ...sealed_files import FILES, check_files, file_digests, read_sealed, read_tensors, require_shapes, write_sealed
from .head import EagleHead
from .layer import EagleHeadError, HeadShape

FORMAT = "specgym-eagle-1"
DESCRIPTION = EAGLE
WEIGHTS = "eagle.safetensors"
_SHIPPED = Path(__file__).parents[2] / "data" / "models"
_LOG = logging.getLogger("specgym")
_TRAIN = "train a head for it: python -m specgym.decoding.fit eagle --target {} --out FOLDER"


def save_head(
    head: EagleHead, folder: str | Path, target: LanguageModel, *, card: str = "", eight_bits: bool = False
) -> None:
    """Write a head, each file whole or not at all, the weights before what describes them.

    Args:
        head: to be written; what it shares with the target is not.
        folder: where; created if need be.
        target: that it was trained for.
        card: text of the model card (README.md); none is written without.
        eight_bits: store matrices in 8 bits with a scale for each row, and all else in float16; otherwise all of it.

    Raises:
        ValueError: what is to be stored in 8 bits is not finite.
    """
    folder = Path(folder)
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in head.state_dict().items()}
    stored = pack(tensors) if eight_bits else tensors
    for name in set(stored) & set(tensors):
        if stored[name].is_floating_point():
            stored[name] = stored[name].to(torch.float16)
    stored["probe"] = probe(target)
    shape = asdict(head.shape)
    if shape.pop("vocabulary"):
        stored["vocabulary"] = torch.tensor(head.shape.vocabulary, dtype=torch.int32)
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(save(stored, metadata={"format": "pt"}))
    described = {"format": FORMAT, "target": target.name, "shape": shape}
    write_sealed(folder / DESCRIPTION, {**described, FILES: file_digests(folder, [WEIGHTS])})
    if card:
        write_text(folder / "README.md", card)


def shipped_heads() -> tuple[str, ...]:
    """The names of the heads inside this package, sorted."""
    return tuple(sorted(path.parent.name for path in _SHIPPED.glob(f"*/{DESCRIPTION}")))


def load_head(name: str | Path, target: LanguageModel, *, strict: bool = True) -> EagleHead:
    """Read a head, attach it to its target and put it into evaluation mode, in the precision of its output layer.

    Args:
        name: a folder that `save_head` wrote or of a public EAGLE-3 head, or the name of a head that ships.
        target: that it was made for.
        strict: refuse a target that is not the one it was made for. Without, as in pairs, it is tried on any of its
            shape, with a warning: on one that was quantised to few bits, or trained further. That costs speed, and
            never changes exact decoding. Nothing in a public folder tells one target from another of the same shape.

    Raises:
        EagleHeadError: it is not there, damaged, or made for another target.
    """
    folder = head_folder(name)
    if folder is None:
        known = ", ".join(shipped_heads()) or "none"
        raise EagleHeadError(
            f"there is no EAGLE head in {name}: it has no {DESCRIPTION}, and no config.json of a public EAGLE-3 head. "
            f"Give the folder of one, or the name of one that ships ({known}), or {_TRAIN.format(target.name)}"
        )
    head = _read(folder, target, strict) if (folder / DESCRIPTION).is_file() else _read_public(folder, target)
    if not all(bool(value.isfinite().all()) for value in head.parameters()):
        raise EagleHeadError(f"{folder} holds NaN or infinite weights; {_TRAIN.format(target.name)}")
    head.to(output_layer(target.model).weight.dtype)
    head.attach(target.model)
    head.name = str(name)
    return head.eval().requires_grad_(False)


def _read(folder: Path, target: LanguageModel, strict: bool) -> EagleHead:
    path = folder / WEIGHTS
    try:
        described = read_sealed(folder / DESCRIPTION, FORMAT)
        if described["format"] != FORMAT:
            raise EagleHeadError(
                f"{folder / DESCRIPTION} has the format {described['format']!r}, and this version reads {FORMAT}"
            )
        check_files(folder, described, WEIGHTS)
        tensors = load_file(path)
        made_for = tensors.pop("probe")
        vocabulary = tensors.pop("vocabulary", torch.empty(0)).tolist()
        facts = {**described["shape"], "layers": tuple(described["shape"]["layers"])}
        head = _filled(HeadShape(**facts, vocabulary=tuple(map(int, vocabulary))), unpack(tensors))
    except FileNotFoundError:
        raise EagleHeadError(f"{path} is missing; {_TRAIN.format(target.name)}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, EagleHeadError) and str(folder) in str(error):
            raise
        raise EagleHeadError(
            f"{path} is damaged or does not fit {DESCRIPTION} ({' '.join(str(error).split())}); fetch both again, or "
            f"{_TRAIN.format(target.name)}"
        ) from error
    if alike(made_for, probe(target)):
        return head
    if strict:
        raise EagleHeadError(
            f"the head in {folder} was made for the target {described['target']}, and {target.name} is another model "
            f"(or was trained further, quantised to few bits, or is damaged); {_TRAIN.format(target.name)}, or take it "
            "all the same with load_head(..., strict=False)"
        )
    _LOG.warning(
        "the EAGLE head in %s was made for the target %s, of which %s is another version, if not another model: it may "
        "be right less often",
        folder, described["target"], target.name,
    )  # fmt: skip
    return head


def _filled(shape: HeadShape, tensors: Mapping[str, Tensor]) -> EagleHead:
    with torch.device("meta"):
        require_shapes(EagleHead(shape).state_dict(), tensors)
    head = EagleHead(shape)
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    return head


_PUBLIC_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_REFUSED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "num_hidden_layers": 1}
"""Settings of the layer that a head has to have as it is here, where they are given."""
_OPTIONS = ("norm_before_fc", "fc_norm", "parallel_drafting", "use_aux_hidden_state")


def _read_public(folder: Path, target: LanguageModel) -> EagleHead:
    config = public_head(folder)
    assert config is not None
    path = next((folder / name for name in _PUBLIC_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise EagleHeadError(f"{folder} has none of {', '.join(_PUBLIC_WEIGHTS)}; fetch the whole folder")
    tensors = {name.removeprefix("model."): value for name, value in read_tensors(path, EagleHeadError).items()}
    tensors = {name.replace("layers.0.", "midlayer.", 1): value for name, value in tensors.items()}
    tensors.pop("t2d", None)
    offsets, fc = tensors.pop("d2t", None), tensors.get("fc.weight")
    if fc is None or "midlayer.hidden_norm.weight" not in tensors:
        raise EagleHeadError(
            f"{path} lacks fc.weight or midlayer.hidden_norm.weight, so that it is no EAGLE-3 head (one of EAGLE 1 or "
            f"2 has other layers); take one of EAGLE-3, or {_TRAIN.format(target.name)}"
        )
    try:
        shape, order = _public_shape(config, target, tensors, offsets)
        if order is not None and "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
        return _filled(shape, tensors)
    except EagleHeadError as error:
        raise EagleHeadError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise EagleHeadError(
            f"{folder} does not fit what is read here of EAGLE-3 heads ({' '.join(str(error).split())}); "
            f"{_TRAIN.format(target.name)}"
        ) from error


def _public_shape(
    config: Mapping[str, Any], target: LanguageModel, tensors: Mapping[str, Tensor], offsets: Tensor | None
) -> tuple[HeadShape, Tensor | None]:
    """Sizes of a public head, and the order of its outputs by the target's tokens; None where all are proposed."""
    layer: Mapping[str, Any] = config.get("transformer_layer_config") or config
    for name, expected in _REFUSED.items():
        if layer.get(name, expected) != expected:
            raise EagleHeadError(f"{name} is {layer[name]!r}, and heads are read here with {expected!r} alone")
    eagle = config.get("eagle_config") or {}
    for name in _OPTIONS:
        value = eagle.get(name, config.get(name))
        if value not in (None, False) and name != "use_aux_hidden_state":
            raise EagleHeadError(f"{name} is {value!r}, which is not supported here")
    if eagle.get("use_aux_hidden_state") is False:
        raise EagleHeadError("use_aux_hidden_state is False, and heads read three layers of the target here")
    hidden, heads = int(layer["hidden_size"]), int(layer["num_attention_heads"])
    whole: Any = target.model.config.get_text_config(decoder=True)
    count = int(whole.num_hidden_layers)
    named = config.get("eagle_aux_hidden_state_layer_ids") or eagle.get("eagle_aux_hidden_state_layer_ids")
    layers = tuple(map(int, named)) if named else (2, count // 2, count - 3)
    vocabulary, order = tuple[int, ...](), None
    if offsets is not None:
        tokens = torch.arange(len(offsets)) + offsets.to("cpu", torch.int64)
        order = tokens.argsort()
        vocabulary = tuple(tokens[order].tolist())
    rope = layer.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": float(layer.get("rope_theta", 10000.0)),
        **{
            ("rope_type" if name == "type" else name): value
            for name, value in (layer.get("rope_scaling") or {}).items()
        },
    }
    return (
        HeadShape(
            hidden_size=hidden,
            target_hidden_size=int(
                config.get("target_hidden_size") or layer.get("target_hidden_size") or target.hidden_size
            ),
            vocabulary_size=len(output_layer(target.model).weight),
            layers=layers,
            heads=heads,
            kv_heads=int(layer.get("num_key_value_heads") or heads),
            head_dim=int(layer.get("head_dim") or hidden // heads),
            intermediate_size=int(layer["intermediate_size"]),
            vocabulary=vocabulary,
            own_output="lm_head.weight" in tensors,
            own_embeddings="embed_tokens.weight" in tensors,
            norm_features=False,
            norm_before_residual=bool(config.get("norm_before_residual", False)),
            norm_eps=float(layer.get("rms_norm_eps", 1e-6)),
            rope=dict(rope),
            context=max(int(layer.get("max_position_embeddings") or 0), target.context_limit),
        ),
        order,
    )
