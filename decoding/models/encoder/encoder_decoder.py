"""Models with an encoder (T5, BART, Marian, Pegasus and their kin), read as language models of their decoder's text.

The *source* is what the encoder reads, once a text: a sentence to be translated, an article to be summed up. Its hidden
states, and the keys and values that every decoder layer makes of them, are computed when the text begins, and the text
that grows is the decoder's, from its start token on. Its own keys and values can be cut back like those of any other
model, so that chains are verified as there. Trees are not: these decoders number positions by the length of the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ...errors import ArgumentError, PromptError, UnsupportedModelError
from ..identity import weights_one_by_one
from ..joint.cache import JointCache, Slot
from ..joint.passes import Begun, Source
from ..kv_cache import BranchingCache, TokenTree
from ..language_model import LanguageModel
from ..linear_layers import only_looking
from ..output_layer import Logits, output_layer_watched
from ..supported import causal_model, refuse_unsupported
from ..trial import UNLIMITED, Reading, Role
from .passes import PassesWithSources, Sources
from .trial import settle

_SOURCE = ("max_position_embeddings", "max_source_positions", "max_encoder_position_embeddings")
_TEXT = ("max_position_embeddings", "max_target_positions", "max_decoder_position_embeddings")


class EncoderDecoder(LanguageModel):
    """An encoder-decoder as a language model of its decoder's text, after a source that its encoder has read.

    `begin` runs the encoder and returns the model as it reads one text. Positions, `length` and `context_limit` are
    those of the decoder's text, which begins with the decoder's start token. `LanguageModel(model)` makes one of these
    where the model has an encoder.

    Attributes:
        source: tokens that the encoder has read for this text; empty before `begin`.
        states: what it made of them, shape (1, source, hidden size); None before.
        start_token: id with which every text begins.
        source_limit: tokens of the longest source.

    Args:
        model: any encoder-decoder of transformers that reads and writes tokens. It is put into evaluation mode.
        prepack: must not be True; these models' linear layers stay as they are.
        role: as for `LanguageModel`.

    Raises:
        ArgumentError: prepacking is asked for.
        UnsupportedModelError: the model cannot be decoded speculatively.
        NumericalError: the model's weights give NaN.
    """

    branches = False
    states: Tensor | None = None
    source_limit: int
    source_vocabulary: int
    joint_passes = PassesWithSources
    _alike: WeakKeyDictionary[PreTrainedModel, bool]
    _crossed: DynamicCache | None = None

    def __init__(self, model: PreTrainedModel, *, prepack: bool | None = None, role: Role = "target") -> None:
        refuse_unsupported(causal_model(model, role), exact=role == "target")
        if prepack:
            raise ArgumentError(
                f"{type(model).__name__} has an encoder, and such models are not prepacked: leave `prepack` unset"
            )
        reading = Reading(why_no_branches=f"{type(model).__name__} numbers positions by the length of its cache")
        self._set_up(model.eval(), reading)
        self._set_up(model, settle(model, self.start_token, EncoderDecoder.as_read, reading, role))

    def _set_up(self, model: PreTrainedModel, reading: Reading) -> None:
        super()._set_up(model, reading)
        with only_looking():
            rows: Any = getattr(model.get_output_embeddings(), "weight", None)
            inputs: Any = getattr(model.get_input_embeddings(), "weight", None)
        if rows is not None:  # Marian and its kin may have two vocabularies
            self.vocabulary_size = len(rows)
        self.source_vocabulary = self.vocabulary_size if inputs is None else len(inputs)
        self.context_limit = _declared(model.config, _TEXT)
        self.source_limit = _declared(model.config, _SOURCE)
        self.start_token = start_token(model)
        self._alike = WeakKeyDictionary[PreTrainedModel, bool]()

    def _forget(self) -> None:
        self._cache, self._text = BranchingCache(), None
        self._last_start, self._at_once, self._beyond = 0, 0, False

    @property
    def joinable(self) -> bool:
        """True: a text has keys and values alone, its own and those of its source."""
        return True

    def move_into(self, joint: JointCache) -> Slot:
        """Keep what is read in a joint cache from now on, and the source beside it."""
        slot = super().move_into(joint)
        if slot.source is None and self._crossed is not None:
            layers: list[Any] = self._crossed.layers
            joint.admit_source(slot, [part for layer in layers for part in (layer.keys, layer.values)])
        return slot

    @torch.inference_mode()
    def begin(self, prompt: Sequence[int], states: Tensor | None = None) -> tuple[LanguageModel, list[int]]:
        """Read a source, and return the model as it reads its text, with the first tokens of that.

        Args:
            prompt: ids of the source.
            states: what an equal encoder made of it, shape (1, source, hidden size); by default the encoder is run.
        """
        source = Source(tuple(prompt), states)
        joined = cast("EncoderDecoder", self.fresh())._joined
        begun = joined.begin(source) if joined is not None else None
        return self.after(source, begun or Sources(self).read([source])[0]), [self.start_token]

    def after(self, source: Source, begun: Begun) -> LanguageModel:
        """Return the model as it reads its text after a source that was read."""
        text = cast("EncoderDecoder", self.fresh())
        text.source, text.states, text._crossed = tuple(source.prompt), begun.states, DynamicCache()
        for layer, (keys, values) in enumerate(zip(begun.parts[::2], begun.parts[1::2], strict=True)):
            text._crossed.update(keys, values, layer)
        return text

    def beside(self, target: LanguageModel) -> LanguageModel:
        """Return this draft as it reads the text of a target, with what the target's encoder read if both are equal.

        A source that its encoder cannot read leaves it without room: it drafts nothing.
        """
        states: Tensor | None = getattr(target, "states", None)
        if states is not None and self.shares_encoder_with(target.model):
            return self.begin(target.source, states.to(self.device))[0]
        if len(target.source) > self.source_limit or max(target.source, default=0) >= self.source_vocabulary:
            silent = copy.copy(self)
            silent.context_limit = 0
            return silent
        return self.begin(target.source)[0]

    def shares_encoder_with(self, model: PreTrainedModel) -> bool:
        """Return whether this model's encoder and another's are equal, to the last bit; looked up after the first time.

        That is so for drafts that ``fit draft`` distils.
        """
        if model not in self._alike:  # which all copies share
            self._alike[model] = _equal(self.model.get_encoder(), model.get_encoder())
        return self._alike[model]

    def _pass(
        self, tokens: Tensor, tree: TokenTree | None, start: int, last: int | None, rows: Tensor | None, hidden: bool
    ) -> Logits:
        if self._crossed is None:
            raise PromptError(
                f"{self.name} has an encoder, which has read nothing yet: read with what `begin(source)` returns"
            )
        if self._joined and (joined := self._joined.read(tokens, tree, start, last, rows, hidden)):
            return Logits(*joined)
        cache = self._cache.as_cache(tokens.shape[0]) if isinstance(self._cache, Slot) else self._cache
        inputs: dict[str, Any] = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=self.states),
            "decoder_input_ids": tokens.unsqueeze(0),
            "past_key_values": EncoderDecoderCache(cache, self._crossed),
            "use_cache": True,
            "return_dict": True,
        }
        with output_layer_watched(self.model, hidden) as states:
            scores = self.model(**inputs).logits[0]
        kept = slice(-(last or 0), None) if rows is None else rows
        return Logits(scores[kept].float(), states[-1][0][kept] if hidden else None)


def class_of(model: object) -> type[LanguageModel]:
    """Return the class that reads a model of transformers."""
    return EncoderDecoder if has_encoder(model) else LanguageModel


def has_encoder(model: object) -> bool:
    """Return whether a model of transformers is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def with_source_of(target: LanguageModel, draft: LanguageModel) -> LanguageModel:
    """Return a draft that can read what its target reads.

    Raises:
        UnsupportedModelError: it has an encoder, and the target has none.
    """
    if isinstance(draft, EncoderDecoder) and not isinstance(target, EncoderDecoder):
        raise UnsupportedModelError(
            f"the draft {draft.name} has an encoder, and {target.name} has none and so no source: choose a causal LM"
        )
    return draft


def _declared(config: PreTrainedConfig, names: Sequence[str]) -> int:
    values = [getattr(config, name, None) for name in names]
    return min((value for value in values if isinstance(value, int) and value > 0), default=UNLIMITED)


def start_token(model: PreTrainedModel) -> int:
    """Return the id with which every text of an encoder-decoder begins.

    Raises:
        UnsupportedModelError: neither of its configurations says.
    """
    for source in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(source, name, None)
            if isinstance(token, int):
                return token
    raise UnsupportedModelError(
        f"{type(model).__name__} does not say how its texts begin: set model.generation_config.decoder_start_token_id"
    )


def _equal(encoder: nn.Module, other: nn.Module) -> bool:
    """True if two encoders are the same in structure and weights."""
    if encoder is other:
        return True
    with only_looking():
        states = encoder.state_dict(), other.state_dict()
    shapes, others = ([(name, weight.shape, weight.dtype) for name, weight in state.items()] for state in states)
    if type(encoder) is not type(other) or shapes != others:
        return False
    weights = zip(weights_one_by_one(encoder), weights_one_by_one(other), strict=True)
    return all(mine is its or torch.equal(mine, its.to(mine.device)) for (_, mine), (_, its) in weights)
