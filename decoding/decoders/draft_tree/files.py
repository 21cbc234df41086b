"""Alignments and acceptance predictors as files, and probes by which they know the two models that they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...files import replacing, write_text
from ...models.identity import alike, probe
from ...models.language_model import LanguageModel
from ...sealed_files import FILES, check_files, file_digests, read_sealed, require_shapes, write_sealed
from .alignment import AffineAlignment, DraftTreeModelError, OtherModelsError
from .predictor import AcceptancePredictor, PredictorShape

_SIDES = ("draft", "target")
_SHIPPED = Path(__file__).parents[2] / "data" / "models"
_Made = TypeVar("_Made", bound=nn.Module)


@dataclass(frozen=True)
class Kind:
    """One of the two things that are kept here.

    Attributes:
        name: of its files and its command.
        what: it is, in messages.
    """

    name: str
    what: str

    @property
    def description(self) -> str:
        """Name of the file that describes it."""
        return f"{self.name}.json"

    @property
    def weights(self) -> str:
        """Name of the file that holds it."""
        return f"{self.name}.safetensors"

    @property
    def format(self) -> str:
        """Format name in the description."""
        return f"specgym-{self.name}-2"

    @property
    def unsealed(self) -> str:
        """Format name of earlier versions, which wrote no checksums."""
        return f"specgym-{self.name}-1"

    def fit(self, draft: LanguageModel, target: LanguageModel) -> str:
        """The way out: how to make one."""
        return f"fit one: python -m specgym.decoding.fit {self.name} --draft {draft.name} --target {target.name} --out "


ALIGNMENT = Kind("alignment", "alignment")
ACCEPTANCE = Kind("acceptance", "acceptance predictor")


def save_alignment(
    alignment: AffineAlignment, folder: str | Path, draft: LanguageModel, target: LanguageModel, *, card: str = ""
) -> None:
    """Write an alignment in float16, each file whole or not at all, the weights before what describes them.

    Args:
        alignment: to be written.
        folder: where; created if need be.
        draft: whose states it maps.
        target: to whose states.
        card: text of the model card (README.md); none is written without.
    """
    described = {"draft_size": alignment.draft_size, "target_size": alignment.target_size}
    probes = {"draft_probe": probe(draft), "target_probe": probe(target)}
    _save(ALIGNMENT, alignment, Path(folder), probes, (draft, target), described, card)


def load_alignment(name: str | Path, draft: LanguageModel, target: LanguageModel) -> AffineAlignment:
    """Read an alignment in float32, in evaluation mode, on the draft's device.

    Args:
        name: a folder that `save_alignment` wrote, or the name of one that the package ships.
        draft: whose states it is to map.
        target: to whose states.

    Raises:
        DraftTreeModelError: it is not there, damaged, or made for other models.
    """

    def make(shape: Mapping[str, Any]) -> AffineAlignment:
        return AffineAlignment(int(shape["draft_size"]), int(shape["target_size"]))

    def probes(alignment: AffineAlignment) -> Mapping[str, Tensor]:
        return {"draft_probe": probe(draft), "target_probe": probe(target)}

    return _load(ALIGNMENT, name, (draft, target), make, probes)


def save_acceptance(
    predictor: AcceptancePredictor,
    folder: str | Path,
    draft: LanguageModel,
    target: LanguageModel,
    alignment: AffineAlignment,
    *,
    card: str = "",
) -> None:
    """Write an acceptance predictor in float16, each file whole or not at all, the weights before what describes them.

    Args:
        predictor: to be written.
        folder: where; created if need be.
        draft: whose candidates it judges.
        target: that accepts them.
        alignment: that maps the states which it reads.
        card: text of the model card (README.md); none is written without.
    """
    probes = _aligned_probes(draft, target, alignment)
    _save(ACCEPTANCE, predictor, Path(folder), probes, (draft, target), asdict(predictor.shape), card)


def load_acceptance(
    name: str | Path, draft: LanguageModel, target: LanguageModel, alignment: AffineAlignment
) -> AcceptancePredictor:
    """Read an acceptance predictor in float32, in evaluation mode, on the draft's device.

    Args:
        name: a folder that `save_acceptance` wrote, or the name of one that the package ships.
        draft: whose candidates it is to judge.
        target: that accepts them.
        alignment: that maps the states which it reads; another than the one that it was trained with is refused.

    Raises:
        DraftTreeModelError: it is not there, damaged, or made for other models or another alignment.
    """

    def make(shape: Mapping[str, Any]) -> AcceptancePredictor:
        predictor = AcceptancePredictor(PredictorShape(**shape))
        width = predictor.shape.hidden_size
        if width != alignment.target_size:
            raise ValueError(f"hidden_size {width} is not that of the alignment, {alignment.target_size}")
        return predictor

    def probes(predictor: AcceptancePredictor) -> Mapping[str, Tensor]:
        return _aligned_probes(draft, target, alignment)

    return _load(ACCEPTANCE, name, (draft, target), make, probes)


def usual_alignment(draft: LanguageModel, target: LanguageModel) -> AffineAlignment | None:
    """The alignment where none is named: in ``<draft>-alignment`` beside the draft's folder, or that ships for it.

    Returns:
        None if there is none, or if one ships for the draft with another target.

    Raises:
        DraftTreeModelError: it is damaged, or the one beside the draft was made for another target.
    """
    return _usual(ALIGNMENT, draft, lambda folder: load_alignment(folder, draft, target))


def usual_acceptance(
    draft: LanguageModel, target: LanguageModel, alignment: AffineAlignment
) -> AcceptancePredictor | None:
    """The predictor where none is named: in ``<draft>-acceptance`` beside the draft's folder, or that ships for it.

    Returns:
        None if there is none, or if one ships for the draft with another target or alignment.

    Raises:
        DraftTreeModelError: it is damaged, or the one beside the draft was made for another target or alignment.
    """
    return _usual(ACCEPTANCE, draft, lambda folder: load_acceptance(folder, draft, target, alignment))


def _aligned_probes(draft: LanguageModel, target: LanguageModel, alignment: AffineAlignment) -> dict[str, Tensor]:
    with torch.no_grad():
        aligned = alignment(probe(draft).to(alignment.weight.device)).cpu()
    return {"draft_probe": aligned, "target_probe": probe(target)}


def _usual(kind: Kind, draft: LanguageModel, load: Callable[[Path], _Made]) -> _Made | None:
    beside = Path(draft.name).expanduser()
    beside = beside.with_name(f"{beside.name}-{kind.name}")
    shipped = _SHIPPED / f"{Path(draft.name).name.lower()}-{kind.name}"
    if (beside / kind.description).is_file() and beside.resolve() != shipped.resolve():
        return load(beside)
    try:
        return load(shipped) if (shipped / kind.description).is_file() else None
    except OtherModelsError:  # a draft that ships may serve a target of yours, for which nothing was fitted
        return None


def _save(
    kind: Kind,
    module: nn.Module,
    folder: Path,
    probes: Mapping[str, Tensor],
    models: tuple[LanguageModel, LanguageModel],
    shape: Mapping[str, Any],
    card: str,
) -> None:
    tensors = {name: value.detach().to("cpu", torch.float16) for name, value in module.named_parameters()}
    tensors |= {name: value.detach().cpu() for name, value in module.named_buffers()}
    tensors = {name: value.contiguous() for name, value in (tensors | dict(probes)).items()}
    draft, target = models
    described = {"format": kind.format, "draft": draft.name, "target": target.name, "shape": shape}
    with replacing(folder / kind.weights) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_sealed(folder / kind.description, {**described, FILES: file_digests(folder, [kind.weights])})
    if card:
        write_text(folder / "README.md", card)


def _load(
    kind: Kind,
    name: str | Path,
    models: tuple[LanguageModel, LanguageModel],
    make: Callable[[Mapping[str, Any]], _Made],
    probes: Callable[[_Made], Mapping[str, Tensor]],
) -> _Made:
    draft, target = models
    folder = Path(name).expanduser()
    if not folder.is_dir() and (_SHIPPED / name / kind.description).is_file():
        folder = _SHIPPED / name
    path, way_out = folder / kind.weights, f"{kind.fit(draft, target)}{folder}"
    described = _description(kind, folder, way_out)
    try:
        check_files(folder, described, kind.weights)
        tensors = {key: value.float() for key, value in load_file(path).items()}
        made_for = {key: tensors.pop(key) for key in ("draft_probe", "target_probe")}
        with torch.device("meta"):
            require_shapes(make(described["shape"]).state_dict(), tensors)
        module = make(described["shape"])
        module.load_state_dict(tensors)
    except FileNotFoundError:
        raise DraftTreeModelError(f"{path} is missing; {way_out}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DraftTreeModelError(
            f"{path} is damaged or does not fit {kind.description} ({' '.join(str(error).split())}); fetch both again, "
            f"or {way_out}"
        ) from error
    if not all(bool(value.isfinite().all()) for value in module.state_dict().values()):
        raise DraftTreeModelError(f"{folder} holds NaN or infinite weights; fetch it again, or {way_out}")
    here = probes(module)
    for key, side, model in (("draft_probe", "draft", draft), ("target_probe", "target", target)):
        if not alike(made_for[key], here[key]):
            of_alignment = " or has another alignment" if kind is ACCEPTANCE and side == "draft" else ""
            raise OtherModelsError(
                f"the {kind.what} in {folder} was made for the {side} {described[side]}, and {model.name} is another "
                f"model (or was trained further, or quantised to few bits){of_alignment}; {way_out}"
            )
    return module.to(draft.device).eval()


def _description(kind: Kind, folder: Path, way_out: str) -> Mapping[str, Any]:
    path = folder / kind.description
    try:
        described = read_sealed(path, kind.format)
        stored = described["format"]
        if stored in (kind.format, kind.unsealed) and not (
            isinstance(described["shape"], dict) and all(isinstance(described[side], str) for side in _SIDES)
        ):
            raise ValueError("shape must be an object, and draft and target names")
    except FileNotFoundError:
        known = ", ".join(sorted(file.parent.name for file in _SHIPPED.glob(f"*/{kind.description}"))) or "none"
        raise DraftTreeModelError(
            f"there is no {kind.what} in {folder}: it has no {kind.description}. Give its folder, or the name of one "
            f"that ships ({known}), or {way_out}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DraftTreeModelError(f"{path} is damaged ({error!r}); fetch it again, or {way_out}") from error
    if stored not in (kind.format, kind.unsealed):
        raise DraftTreeModelError(f"{path} has the format {stored!r}, and this version reads {kind.format}")
    return described
