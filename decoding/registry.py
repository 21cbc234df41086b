"""Registry of tunable decoders: the built-in ones, those of installed packages, and `register`. Free of torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .errors import SpecgymError
from .traits import DecoderTraits, camel_case

if TYPE_CHECKING:
    from .decoder import Decoder
    from .loading.pair import Pair

ENTRY_POINTS = "specgym.decoders"
"""Entry-point group that other packages list their decoders in, by name: `copy-last = "package.module:CopyLast"`."""

_FOLDER = f"{__package__}.decoders"
_BUILT_IN = {
    f"{_FOLDER}.threshold:ThresholdDecoder": f"{_FOLDER}.traits:ThresholdTraits",
    f"{_FOLDER}.chain:SpeculativeDecoder": f"{_FOLDER}.traits:SpeculativeTraits",
    f"{_FOLDER}.lookahead.decoder:LookaheadDecoder": f"{_FOLDER}.lookahead.traits:LookaheadTraits",
    f"{_FOLDER}.medusa.decoder:MedusaDecoder": f"{_FOLDER}.medusa.traits:MedusaTraits",
    f"{_FOLDER}.medusa.decoder:TypicalMedusaDecoder": f"{_FOLDER}.medusa.traits:TypicalMedusaTraits",
    f"{_FOLDER}.draft_tree.decoder:DraftTreeDecoder": f"{_FOLDER}.draft_tree.traits:DraftTreeTraits",
    f"{_FOLDER}.pipelined.decoder:PipelinedDecoder": f"{_FOLDER}.pipelined.traits:PipelinedTraits",
}


class DecoderRegistryError(SpecgymError, ValueError):
    """A decoder that is not registered, or cannot be; the message names it and the way out."""


@dataclass
class _Entry:
    """A registered decoder. Paths (`module:Class`) are imported when they are needed."""

    name: str
    env_name: str
    decoder: type[Decoder[Any]] | str
    traits: type[DecoderTraits] | str | None


_entries: dict[str, _Entry] = {}


def register(decoder: type[Decoder[Any]] | str, traits: str | None = None) -> None:
    """Make a decoder known by its name, to environments, recording and training.

    A decoder of the same class path may be registered again, as a notebook does.

    Args:
        decoder: the class, or its path (`package.module:Class`), which is imported when a pair is at hand.
        traits: path of its `DecoderTraits`, for a decoder that should be known without importing torch; by default the
            decoder itself tells them, and is imported now.

    Raises:
        DecoderRegistryError: the class is no decoder, has no name or no knobs, or its name is taken.
    """
    _registered()
    _add(_entry_of(decoder, traits))


def decoder_names() -> tuple[str, ...]:
    """Return the names of all registered decoders, the built-in ones first. None is imported for it."""
    return tuple(_registered())


def environment_names() -> Mapping[str, str]:
    """Return the environment name of every decoder, by decoder name: `{"threshold": "Thresholds", ...}`."""
    return {name: entry.env_name for name, entry in _registered().items()}


def traits_of(decoder: str | DecoderTraits | type[DecoderTraits]) -> type[DecoderTraits]:
    """Return what is known of a decoder without a pair; for the built-in ones without importing torch.

    Args:
        decoder: a name, a decoder or its class.

    Raises:
        DecoderRegistryError: no decoder of this name is registered, or it cannot be imported.
    """
    if isinstance(decoder, DecoderTraits):
        return type(decoder)
    if isinstance(decoder, type):
        return decoder
    entry = _find(decoder)
    if entry.traits is None:
        return decoder_class(decoder)
    if isinstance(entry.traits, str):
        entry.traits = _checked(_import(entry.traits), entry)
    return entry.traits


def decoder_class(name: str) -> type[Decoder[Any]]:
    """Return the class of a decoder, which imports torch.

    Raises:
        DecoderRegistryError: no decoder of this name is registered, or it cannot be imported.
    """
    entry = _find(name)
    if isinstance(entry.decoder, str):
        entry.decoder = cast("type[Decoder[Any]]", _checked(_import(entry.decoder), entry))
    return entry.decoder


def build_decoder(decoder: str | Callable[[Pair], Decoder[Any]], pair: Pair, **options: Any) -> Decoder[Any]:
    """Build a decoder for a pair.

    Args:
        decoder: a registered name, or a callable that takes the pair (such as a decoder's class).
        pair: a target, with a draft where the decoder needs one.
        options: build options of a named decoder (`DecoderTraits.Options`); a callable gets none.

    Raises:
        DecoderRegistryError: no decoder of this name is registered, or the decoder has no knobs.
        ValueError: an unknown option, or the pair does not suit the decoder.
    """
    built = decoder(pair) if callable(decoder) else decoder_class(decoder).for_pair(pair, **options)
    if not built.knobs:
        raise DecoderRegistryError(f"{type(built).__name__} has no knobs, so there is nothing to tune")
    return built


def _registered() -> dict[str, _Entry]:
    """All entries; the first call adds the built-in ones and those of installed packages."""
    if not _entries:
        for path, traits in _BUILT_IN.items():
            _add(_entry_of(path, traits))
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            try:
                _add(_Entry(point.name, camel_case(point.name), point.value, None))
            except DecoderRegistryError as error:
                warnings.warn(f"the entry point {point.name} = {point.value} is left out: {error}", stacklevel=2)
    return _entries


def _find(name: str) -> _Entry:
    entries = _registered()
    if name not in entries:
        raise DecoderRegistryError(
            f"no decoder {name!r}; there are: {', '.join(entries)}. Give a callable that builds one from a pair, or "
            "register a decoder with specgym.register"
        )
    return entries[name]


def _entry_of(decoder: type[Decoder[Any]] | str, traits: str | None) -> _Entry:
    described = _import(traits) if traits is not None else decoder
    if isinstance(described, str):
        decoder = described = _import(described)
    kind = _described(described)
    return _Entry(kind.name, kind.env_name, decoder, None if traits is None else kind)


def _described(kind: Any) -> type[DecoderTraits]:
    """The class, if it tells all that an environment needs.

    Raises:
        DecoderRegistryError: it does not.
    """
    if not (isinstance(kind, type) and issubclass(kind, DecoderTraits)):
        raise DecoderRegistryError(f"{kind!r} is no decoder: give a subclass of specgym.decoding.Decoder")
    for attribute in ("name", "lossless", "env_name"):
        if not hasattr(kind, attribute):
            raise DecoderRegistryError(f"{kind.__qualname__} has no attribute {attribute!r}; set it in the class")
    if not kind.knobs_without_pair():
        raise DecoderRegistryError(
            f"{kind.__qualname__} has no knobs, so there is nothing to tune; set `knobs` in the class, or override "
            "knobs_without_pair"
        )
    return kind


def _checked(kind: Any, entry: _Entry) -> type[DecoderTraits]:
    """An imported class, if it is what its entry says."""
    kind = _described(kind)
    if (kind.name, kind.env_name) != (entry.name, entry.env_name):
        raise DecoderRegistryError(
            f"decoder {entry.name!r} (environment {entry.env_name}) is the class {kind.__qualname__}, which says "
            f"name = {kind.name!r} and env_name = {kind.env_name!r}; make the two agree"
        )
    return kind


def _add(entry: _Entry) -> None:
    for other in _entries.values():
        same = _path(other.decoder) == _path(entry.decoder)
        if not same and (other.name == entry.name or other.env_name == entry.env_name):
            raise DecoderRegistryError(
                f"decoder {entry.name!r} (environment {entry.env_name}) is registered already, by "
                f"{_path(other.decoder)}; choose another name and env_name"
            )
    _entries[entry.name] = entry


def _path(decoder: type | str) -> str:
    return decoder if isinstance(decoder, str) else f"{decoder.__module__}:{decoder.__qualname__}"


def _import(path: str) -> Any:
    """The class that `package.module:Class` names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DecoderRegistryError(f"decoder {path!r} cannot be imported ({error}); give 'module:Class'") from error
