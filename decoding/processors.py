"""Settings of `generate()` besides sampling: transformers' own logits processors, and strings that end a text.

A generation config may ask for more than an end of text: penalties for repetition, words that must not come, a least
length. What depends on the text so far alone is part of the target's distribution: `TextRules` applies it to the scores
of every token that is verified, each after the text that leads to it. A draft is then judged by the same distribution
that `generate()` draws from, so that lossless decoders stay lossless. For the rest (beams, guidance, watermarks) there
is a warning by name.

The order of the processors is that of `generate()`, as its own function puts them together
(`GenerationMixin._get_logits_processor` in generation/utils.py, transformers 5.20 to 5.23).
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)

from .drafts.drafter import Drafter
from .drafts.mixed import with_models
from .loading.pair import Pair
from .models.identity import weights_digest
from .models.kv_cache import TokenTree
from .models.language_model import LanguageModel
from .models.output_layer import Logits
from .sampling import GREEDY, Sampling

_BY_PLACE: Mapping[str, tuple[float, ...]] = {
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_new_tokens": (0,),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": (),
}
"""Settings that depend on where the prompt ends, or the text at the latest, with the numbers that stand for nothing."""
_BY_TEXT: Mapping[str, tuple[float, ...]] = {
    "sequence_bias": (),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "forced_bos_token_id": (),
    "remove_invalid_values": (0,),
    "suppress_tokens": (),
    **_BY_PLACE,
}
"""Settings whose processors need the text so far and nothing else."""
_NORMALISING: Mapping[str, tuple[float, ...]] = {"renormalize_logits": (0,)}
_BY_CHANCE: Mapping[str, tuple[float, ...]] = {
    "top_h": (),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    **_NORMALISING,
}
"""Settings of sampling that `Sampling` does not have. Temperature, top-k and top-p are always those of `Sampling`."""
_ENDING: Mapping[str, tuple[float, ...]] = {"stop_strings": ()}
_IGNORED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda value: value > 1, "the text is that of one beam; use BeamSearchDecoder"),
    "num_return_sequences": (lambda value: value > 1, "one text is generated at a time"),
    "penalty_alpha": (lambda value: value > 0, "there is no contrastive search, and the text is that without it"),
    "dola_layers": (bool, "layers are not contrasted, and the text is that of the last layer"),
    "guidance_scale": (lambda value: value != 1, "there is no guidance, and the text is that without it"),
    "watermarking_config": (bool, "the text has no watermark"),
    "token_healing": (bool, "the prompt's last tokens are left as they are"),
    "constraints": (bool, "the text need not keep to them"),
    "force_words_ids": (bool, "the text need not contain them"),
    "max_time": (bool, "a text ends by its tokens alone: give max_new_tokens"),
    "prompt_lookup_num_tokens": (bool, "the text is the same, but drafts are those of the decoder"),
    "assistant_early_exit": (bool, "the text is the same, but drafts are those of the decoder"),
    "use_mtp": (bool, "the text is the same, but drafts are those of the decoder"),
}
"""Settings that are not followed: when they ask for anything, and what comes of it."""


def text_settings(model: PreTrainedModel, *, place: bool = False) -> dict[str, Any]:
    """Return what a model's generation config asks for besides an end of text and `Sampling`, by name.

    Args:
        model: the target's transformers model.
        place: only the settings that depend on where the prompt ends, or where the text ends at the latest, or that
            end a text by themselves. With those, the rest of a text is not what the text so far would be continued by.

    Returns:
        Settings that are followed and change anything; empty for nearly all models.
    """
    return _settings(model, {**_BY_PLACE, **_ENDING} if place else {**_BY_TEXT, **_BY_CHANCE, **_ENDING})


def target_digest(pair: Pair) -> str:
    """Return a SHA-256 over what a target's texts depend on, 64 hex digits: weights, and `text_settings` if any."""
    digest, settings = weights_digest(pair.target.model), text_settings(pair.target.model)
    if not settings:
        return digest
    return hashlib.sha256(f"{digest} {sorted(settings.items())}".encode()).hexdigest()


def sampling_of(pair: Pair, sampling: Sampling) -> Sampling:
    """Return a sampling setting with what the target's generation config adds to it: min-p, typical-p and their like.

    A greedy setting is returned as it is.
    """
    model = pair.target.model
    settings = {} if sampling.greedy else _settings(model, _BY_CHANCE)
    if not settings:
        return sampling
    config = GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=float(sampling.temperature),
        top_k=int(sampling.top_k),
        top_p=float(sampling.top_p),
        **settings,
    )
    warpers = _put_together(pair, config, 1, [0], ())
    return _WarpedSampling(sampling.temperature, sampling.top_k, sampling.top_p, warpers)


@dataclass(frozen=True)
class _WarpedSampling(Sampling):
    """A sampling setting with further warpers, all in the order of `generate()`."""

    warpers: LogitsProcessorList = field(default_factory=LogitsProcessorList, compare=False)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution that tokens are drawn from, as `Sampling.probabilities`."""
        rows = logits.float().reshape(-1, logits.shape[-1])
        no_text = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)  # none of these looks at it
        return self.warpers(cast(Any, no_text), cast(Any, rows)).softmax(-1).reshape(logits.shape)


@dataclass(frozen=True)
class TextRules:
    """Rules of one text, between a model's scores and the choice of a token.

    Attributes:
        sampling: how tokens are chosen.
        processors: change the scores after a text, shapes (rows, tokens) and (rows, vocabulary).
        stop: says whether a text, shape (1, tokens), ends in a stop string; None where there are no such strings.
    """

    sampling: Sampling
    processors: LogitsProcessorList
    stop: StopStringCriteria | None

    @classmethod
    def of(
        cls,
        pair: Pair,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        logits_processor: Iterable[LogitsProcessor] = (),
        source: Sequence[int] = (),
    ) -> TextRules:
        """Return the rules by which `generate()` would continue a prompt.

        Args:
            pair: whose target, with the generation config that its model has now.
            prompt: token ids, at least one.
            max_new_tokens: tokens of the text, at most.
            sampling: temperature, top-k and top-p.
            logits_processor: further processors, as `generate()` takes them; each takes the place of one of its class.
            source: token ids that an encoder reads, where that is not the prompt.

        Raises:
            ValueError: transformers refuses a setting.
        """
        settings = _settings(pair.target.model, {**_BY_TEXT, **_NORMALISING} if sampling.greedy else _BY_TEXT)
        stop, more = _stop_strings(pair), list(logits_processor)
        if not settings and not more:
            return cls(sampling_of(pair, sampling), LogitsProcessorList(), stop)
        config = GenerationConfig(do_sample=False, num_beams=1, **settings)
        # As `GenerationMixin._prepare_generated_length` has it: one least length counts the prompt, the other does not.
        config.max_length = len(prompt) + max_new_tokens
        if config.min_new_tokens is not None:
            config.min_length = len(prompt) + config.min_new_tokens
        return cls(sampling_of(pair, sampling), _put_together(pair, config, len(prompt), source or prompt, more), stop)

    def target(self, model: LanguageModel) -> LanguageModel:
        """Return a model with an empty cache whose scores obey these rules; without any, just `model.fresh()`."""
        return _following(model, self.processors) if self.processors else model.fresh()

    def draft(self, model: LanguageModel, target: LanguageModel) -> LanguageModel:
        """Return a draft model that obeys the rules too, so that more of its tokens pass; any draft would be exact.

        Where it is on another device than the target, or has other tokens, it is returned as it is.
        """
        alike = model.device == target.device and model.vocabulary_size == target.vocabulary_size
        return _following(model, self.processors, finite=True) if self.processors and alike else model

    def drafter(self, drafter: Drafter, target: LanguageModel) -> Drafter:
        """Return a drafter whose models obey the rules as far as `draft` makes them; one without a model as it is."""
        return with_models(drafter, partial(self.draft, target=target)) if self.processors else drafter

    def stops(self, text: Sequence[int]) -> bool:
        """Return whether a text, prompt included, ends here by a stop string."""
        if self.stop is None:
            return False
        return bool(self.stop(cast(Any, torch.tensor([list(text[-self.stop.maximum_token_len :])])), None))


def check_generation_config(pair: Pair, follows: Collection[str] = ()) -> None:
    """Warn once of what a target's generation config asks for and does not get, but `follows`; refuse what is wrong.

    Raises:
        ValueError: transformers refuses a setting; what it says is in the message.
    """
    model, name = pair.target.model, pair.target.name
    config = getattr(model, "generation_config", None)
    ignored = {
        setting: f"is not followed: {consequence}"
        for setting, (asks, consequence) in _IGNORED.items()
        if setting not in follows and (value := getattr(config, setting, None)) is not None and asks(value)
    }
    if pair.tokenizer is None and _settings(model, _ENDING):
        ignored["stop_strings"] = "is not followed without a tokenizer: give Pair(..., tokenizer=...)"
    if ignored:
        warned = _warned.setdefault(model, set())
        for setting in sorted(ignored.keys() - warned):
            warned.add(setting)
            value = getattr(config, setting)
            warnings.warn(
                f"{name}: generation_config.{setting}={value!r} {ignored[setting]}. To silence this, set it to None "
                "before a decoder is built: model.generation_config." + setting,
                stacklevel=3,
            )
    settings = text_settings(model)
    if not settings:
        return
    try:
        for sampling in (GREEDY, Sampling()):
            rules = TextRules.of(pair, [0], 1, sampling)
            scores = torch.zeros(1, pair.target.vocabulary_size, device=pair.target.device)
            rules.processors(cast(Any, torch.zeros(1, 1, dtype=torch.int64, device=scores.device)), cast(Any, scores))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{name}: its generation_config asks for {', '.join(sorted(settings))}, of which something cannot be done "
            f"({error}). Correct it, or set it to None: model.generation_config"
        ) from error


_warned: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()
_stops: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[list[str], StopStringCriteria]] = WeakKeyDictionary()


def _settings(model: PreTrainedModel, fields: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """The settings among some that ask for anything."""
    config = getattr(model, "generation_config", None)
    values = ((name, getattr(config, name, None), nothing) for name, nothing in fields.items())
    return {name: value for name, value, nothing in values if value is not None and _asks(value, nothing)}


def _asks(value: Any, nothing: tuple[float, ...]) -> bool:
    return value not in nothing if isinstance(value, int | float) else len(value) > 0


def _put_together(
    pair: Pair, config: GenerationConfig, length: int, source: Sequence[int], further: Sequence[LogitsProcessor]
) -> LogitsProcessorList:
    model: Any = pair.target.model
    put_together = getattr(model, "_get_logits_processor", None)
    if put_together is None:  # not of transformers
        return LogitsProcessorList(further)
    device, ends = pair.target.device, sorted(pair.eos_token_ids)
    prepared: Any = config
    prepared._eos_token_tensor = torch.tensor(ends, device=device) if ends else None
    result: LogitsProcessorList = put_together(
        generation_config=prepared,
        input_ids_seq_length=length,
        encoder_input_ids=torch.tensor([list(source)], device=device),
        logits_processor=LogitsProcessorList(further),
        device=device,
        model_kwargs={},
    )
    return result


def _stop_strings(pair: Pair) -> StopStringCriteria | None:
    strings = _settings(pair.target.model, _ENDING).get("stop_strings")
    if strings is None or pair.tokenizer is None:
        return None
    strings = [strings] if isinstance(strings, str) else list(strings)
    known = _stops.get(pair.tokenizer)
    if known is None or known[0] != strings:  # takes seconds where the vocabulary is large
        _stops[pair.tokenizer] = known = strings, StopStringCriteria(pair.tokenizer, strings)
    return known[1]


def _following(model: LanguageModel, processors: LogitsProcessorList, finite: bool = False) -> LanguageModel:
    return cast(LanguageModel, _Following(model.fresh(), processors, finite))


class _Following:
    """A language model with an empty cache whose scores are processed, each after the text that leads to it.

    It knows the text that it has read; all else is the model's. Nodes of equal depth are processed together, as texts
    of equal length are in a batch of `generate()`.

    Args:
        model: that nobody else reads with.
        processors: as of `TextRules`.
        finite: give tokens that cannot come the lowest number instead of minus infinity, as drafts do.
    """

    def __init__(self, model: LanguageModel, processors: LogitsProcessorList, finite: bool) -> None:
        self._model, self._processors, self._finite = model, processors, finite
        self._text = torch.empty(0, dtype=torch.int64, device=model.device)
        self._last_start = 0

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # of an object in the making
            raise AttributeError(name)
        return getattr(self._model, name)

    def fresh(self) -> LanguageModel:
        """Share the weights and the processors, with an empty cache."""
        return _following(self._model, self._processors, self._finite)

    def read(self, tokens: Sequence[int], *, hidden: bool = False, of: int | None = None) -> Tensor | None:
        """Append a text to the cache, as `LanguageModel.read`."""
        before = self._model.length
        state = self._model.read(tokens, hidden=hidden, of=of)
        self._append(torch.tensor(tokens, dtype=torch.int64, device=self._text.device), before)
        return state

    def keep(self, path: Sequence[int]) -> None:
        """Keep only some tokens of the last pass, as `LanguageModel.keep`."""
        self._model.keep(path)
        places = self._last_start + torch.tensor(list(path), dtype=torch.int64, device=self._text.device)
        self._text = torch.cat([self._text[: self._last_start], self._text[places]])

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        tree: TokenTree | None = None,
        *,
        last: int | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Logits:
        """Read tokens and process the scores, as `LanguageModel.forward`."""
        before = self._model.length
        logits = self._model.forward(tokens, tree, last=last, rows=rows, hidden=hidden)
        self._append(tokens, before)
        count = len(tokens) if tree is None else len(tree)
        self._last_start = len(self._text) - count
        if rows is None:
            scored = list(range(count - (last or len(tokens)), count))
        else:
            scored = [count - len(tokens) + row for row in rows.tolist()]
        return logits._replace(scores=self._processed(logits.scores, scored, tree))

    def _append(self, tokens: Tensor, before: int) -> None:
        """Note what was read after the first `before` tokens; the model may have forgotten others since."""
        self._text = torch.cat([self._text[:before], tokens])

    def _processed(self, scores: Tensor, nodes: Sequence[int], tree: TokenTree | None) -> Tensor:
        """Scores of some nodes of the last pass, shape (nodes, vocabulary), after the processors."""
        result = torch.empty_like(scores)
        for rows, texts in self._texts(nodes, tree):
            processed = scores[rows]
            for processor in self._processors:  # the list's own call inspects the signature of each, anew every time
                processed = processor(cast(Any, texts), cast(Any, processed))
            result[rows] = processed.clamp(min=torch.finfo(scores.dtype).min) if self._finite else processed
        return result

    def _texts(self, nodes: Sequence[int], tree: TokenTree | None) -> Iterator[tuple[list[int], Tensor]]:
        """Rows of scores with the texts that they follow, those of equal length together, shape (rows, tokens)."""
        start = self._last_start
        if tree is None:
            for row, node in enumerate(nodes):
                yield [row], self._text[: start + node + 1].unsqueeze(0)
            return
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        paths = [tree.path(node) for node in nodes]
        for row, path in enumerate(paths):
            by_length[len(path)].append(row)
        for rows in by_length.values():
            places = torch.tensor([paths[row] for row in rows], device=self._text.device)
            yield rows, torch.cat([self._text[:start].expand(len(rows), -1), self._text[start + places]], 1)
