"""A target and its draft, and the memory that they take.

Weights are counted as they lie in memory: parameters, buffers and prepacked layers of the target, and of the draft what
it does not share with the target; of a draft that is a table, the table. Keys and values are measured by reading a
token. What is allocated at the peak cannot be told apart by pairs: on CUDA it is the most that torch ever had allocated
on the target's devices since the process began (or since `torch.cuda.reset_peak_memory_stats`), on a CPU the largest
resident memory of the process, with Python, its libraries and all that was loaded. Processes of environments are not in
it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafts.drafter import Drafter, ModelDrafter
from ..drafts.ngram import NGramDrafter, PromptLookupDrafter
from ..drafts.translated import TranslatedModel
from ..drafts.translation import Translation, Vocabulary, highest_id
from ..errors import ArgumentError, PromptError, VocabularyMismatchError
from ..models.language_model import LanguageModel
from ..models.linear_layers import PrepackedLinear, only_looking
from ..models.supported import causal_model
from . import presets
from .find_model import identity, load_model, placement

_TABLES = Path(__file__).parents[1] / "data" / "ngrams"
_SHIPPED_TABLES = {"tiny-10m": "tiny", "tiny-3m": "tiny", presets.SMOLLM2: "smollm2", "smollm2": "smollm2"}


class Pair:
    """A target model with the draft that proposes tokens for it.

    Args:
        target: a Hugging Face causal LM.
        draft: a smaller model, or any `Drafter`; None where no draft is needed.
        tokenizer: the target's; optional. With it, prompts may be strings and generations carry text.
        draft_tokenizer: the draft's, if it is a model; by default the target's. With another one the draft proposes the
            tokens that both have, and the text is still the target's (`TranslatedModel`). Neither tokenizer is needed
            where both models have the same vocabulary.
        name: how reports call the pair; by default made from the models' names.
        prepack: see `LanguageModel`. On CPU the target's large linear layers are packed in place unless this is
            False (`unpack` undoes it); a draft model is left as it is.

    Raises:
        VocabularyMismatchError: the draft's tokens cannot be told in terms of the target's.
        UnsupportedModelError: a model cannot be decoded speculatively, or is none.
    """

    def __init__(
        self,
        target: PreTrainedModel | LanguageModel,
        draft: PreTrainedModel | LanguageModel | Drafter | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        prepack: bool | None = None,
    ) -> None:
        if not isinstance(target, LanguageModel):
            target = LanguageModel(causal_model(target), prepack=prepack)
        if isinstance(draft, nn.Module):
            # It reads a token at a time, where plain weights are as fast.
            draft = LanguageModel(causal_model(draft, "draft"), prepack=False)
        if isinstance(draft, LanguageModel):
            draft = ModelDrafter(draft)
        if draft is not None:
            draft = _in_vocabulary(target, draft, tokenizer, draft_tokenizer)
        self.target = target
        self.draft: Drafter | None = draft
        self.tokenizer = tokenizer
        self.name = name or (f"{target.name}+{draft.name}" if draft is not None else target.name)
        self.eos_token_ids = _eos_token_ids(target.model, tokenizer)

    def unpack(self) -> None:
        """Give the target and the draft their plain weights back: a CPU then takes longer for passes over few tokens.

        Anything that asks for a packed weight gets it (`state_dict`, `parameters`, `to`, `train`, `copy.deepcopy`,
        pickle, merging an adapter), layer by layer and with a warning; this does it for all layers at once.
        """
        self.target.unpack()
        if isinstance(self.draft, ModelDrafter):
            self.draft.model.unpack()

    def pack(self) -> None:
        """Prepack the target's large linear layers that are plain, where its device and type allow it."""
        self.target.pack()

    def without_draft(self) -> Pair:
        """Return the target alone, under its own name: what takes part in rounds that need no draft."""
        return Pair(self.target, None, self.tokenizer, name=self.target.name)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            PromptError: the pair has no tokenizer.
        """
        if self.tokenizer is None:
            raise PromptError(f"pair {self.name} has no tokenizer; give token ids, or Pair(..., tokenizer=...)")
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str | None:
        """The text of some tokens, or None without a tokenizer."""
        return None if self.tokenizer is None else str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


_MOST_PADDING = 1024
"""Rows that pad a vocabulary, at most: layers are padded to multiples of 64 to 1,024 rows."""
_SMALLEST_SHARE = 0.1
"""Share of the smaller vocabulary that the other must have, too, for a draft to be of use."""


def _in_vocabulary(
    target: LanguageModel,
    draft: Drafter,
    tokenizer: PreTrainedTokenizerBase | None,
    draft_tokenizer: PreTrainedTokenizerBase | None,
) -> Drafter:
    """A draft that speaks of the target's tokens: as it is, or translated.

    Raises:
        VocabularyMismatchError: see `Pair`.
    """
    sizes = (
        f"target {target.name} has a vocabulary of {target.vocabulary_size} tokens and draft {draft.name} one of "
        f"{draft.vocabulary_size}"
    )
    alike = draft.vocabulary_size == target.vocabulary_size
    if alike and (draft_tokenizer is None or not isinstance(draft, ModelDrafter)):
        return draft
    if tokenizer is None:
        raise VocabularyMismatchError(
            f"{sizes}; whether they number the same tokens in the same way only their tokenizers can tell: "
            "Pair(target, draft, tokenizer, draft_tokenizer=...). Or choose prompt lookup."
        )
    if draft_tokenizer is None or not isinstance(draft, ModelDrafter):
        known = highest_id(tokenizer) + 1
        smaller, larger = sorted((target.vocabulary_size, draft.vocabulary_size))
        if not known <= smaller <= larger < known + _MOST_PADDING:
            way_out = "Make one for this target."
            if isinstance(draft, ModelDrafter):
                way_out = "Give the draft's tokenizer, too: Pair(..., draft_tokenizer=...)."
            raise VocabularyMismatchError(
                f"{sizes}, and the target's tokenizer knows {known}: the same tokens would be padded alike. {way_out}"
            )
        if not isinstance(draft, ModelDrafter):
            highest = draft.highest_token if isinstance(draft, NGramDrafter) else 0
            if highest >= target.vocabulary_size:
                raise VocabularyMismatchError(
                    f"{sizes}, and the draft proposes token {highest}. Make one for this target."
                )
            return draft
    return ModelDrafter(_translated(target, draft.model, tokenizer, draft_tokenizer or tokenizer))


def _translated(
    target: LanguageModel,
    draft: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    draft_tokenizer: PreTrainedTokenizerBase,
) -> LanguageModel:
    ours, theirs = Vocabulary(tokenizer, target.vocabulary_size), Vocabulary(draft_tokenizer, draft.vocabulary_size)
    if ours.rows == theirs.rows and ours.names == theirs.names:
        return draft
    translation = Translation(ours, theirs)
    smaller = min(len(ours.names), len(theirs.names))
    if translation.common < max(1, _SMALLEST_SHARE * smaller):
        raise VocabularyMismatchError(
            f"target {target.name} and draft {draft.name} have {translation.common:,} tokens in common, of "
            f"{len(ours.names):,} and {len(theirs.names):,} ({translation.difference()}); what the draft could propose "
            "is too little. Choose a draft of the target's own family, or prompt lookup."
        )
    return TranslatedModel(draft, translation)


def require_draft(pair: Pair, user: str) -> Drafter:
    """Return a pair's draft.

    Raises:
        ArgumentError: it has none; the message names the user of the draft.
    """
    if pair.draft is None:
        raise ArgumentError(
            f"{user} needs a draft, and pair {pair.name} has none: name <target>+<draft>, or give Pair(target, draft)"
        )
    return pair.draft


def load_pair(
    name: str = presets.DEFAULT,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    prepack: bool | None = None,
    offline: bool = False,
    shared: bool = True,
) -> Pair:
    """Load a target and its draft by name.

    A model that a pair in this process has already is not loaded again: pairs of one target share its weights, those
    that were prepacked included, and so do pairs of one name their draft's. Texts are decoded independently, as every
    session has a cache of its own. When no pair has a model any more, its memory is freed.

    Args:
        name: a preset (`presets.PRESETS`) or ``target+draft``, each a local folder, a hub id or a shipped model; the
            draft may also be ``prompt-lookup``, ``ngram`` (a table that ships with the package) or the path of a table
            made by ``python -m specgym.decoding.fit ngram``. A folder or ``owner/model`` is a target without a draft.
        dtype: of both models' weights; by default float32 on a CPU and bfloat16 elsewhere.
        device: where both models go; by default CUDA if there is any.
        prepack: see `LanguageModel`.
        offline: make no network attempt.
        shared: False for models that no other pair has, for instance to train them.

    Raises:
        UnknownPairError: the name is neither a preset, nor ``target+draft``, nor a target.
        ModelNotFoundError: a model is in none of the places where it was looked for.
        VocabularyMismatchError: the draft's tokens cannot be told in terms of the target's.
        UnsupportedModelError: a model cannot be decoded speculatively.
        ValueError: no n-gram table ships for this target.
    """
    preset = presets.resolve(name)
    dtype, place = placement(dtype, device)
    models = _models if shared else WeakValueDictionary()
    load = partial(load_model, dtype=dtype, device=place, offline=offline)
    key = (*identity(preset.target), dtype, place, prepack)
    model, tokenizer = _loaded(models, key, partial(load, preset.target))
    vocabulary_size = int(model.config.get_text_config(decoder=True).vocab_size)
    draft: PreTrainedModel | Drafter | None = None
    draft_tokenizer: PreTrainedTokenizerBase | None = None
    if preset.draft is None:
        pass
    elif preset.draft == presets.PROMPT_LOOKUP:
        draft = PromptLookupDrafter(vocabulary_size)
    elif preset.draft == presets.NGRAM:
        draft = NGramDrafter.load(_shipped_table(preset.target), name=presets.NGRAM)
    elif preset.draft.endswith(".safetensors"):
        draft = NGramDrafter.load(preset.draft)
    else:
        # Loaded before anything is prepacked, so that a draft can still take the target's plain weights.
        draft, draft_tokenizer = _loaded(
            models, (*identity(preset.draft), *key), partial(load, preset.draft, shared_from=model)
        )
    return Pair(model, draft, tokenizer, draft_tokenizer=draft_tokenizer, name=preset.name, prepack=prepack)


_models: WeakValueDictionary[tuple[Hashable, ...], PreTrainedModel] = WeakValueDictionary()
_tokenizers: WeakKeyDictionary[PreTrainedModel, PreTrainedTokenizerBase] = WeakKeyDictionary()


def _loaded(
    models: WeakValueDictionary[tuple[Hashable, ...], PreTrainedModel],
    key: tuple[Hashable, ...],
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its tokenizer: the one that is held under a key, or else loaded now and held weakly."""
    model = models.get(key)
    if model is None:
        model, tokenizer = load()
        models[key], _tokenizers[model] = model, tokenizer
    return model, _tokenizers[model]


def _shipped_table(target: str) -> Path:
    table = _SHIPPED_TABLES.get(target)
    if table is None:
        raise ValueError(
            f"no n-gram table ships for {target}. Fit one on text of your own: python -m specgym.decoding.fit ngram "
            f"--target {target} --text TEXT... --out table.safetensors, and use the pair {target}+table.safetensors"
        )
    return _TABLES / f"{table}.safetensors"


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    sources: list[Any] = [getattr(model, "generation_config", None), model.config, tokenizer]
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a pair takes.

    Attributes:
        pair: name of the pair.
        target: of the target's weights.
        draft: of the draft's weights beside the target's; 0 for none and for drafts that copy from the text.
        per_token: of keys and values for every token of a text, of both models.
        peak: most that was in use so far, by everything; None where the system does not say.
        peak_of: what the peak is of: `process`, or the CUDA devices.
    """

    pair: str
    target: int
    draft: int
    per_token: int
    peak: int | None
    peak_of: str

    def __str__(self) -> str:
        text = f"{self.pair}: weights {_amount(self.target)} (target)"
        text += f" + {_amount(self.draft)} (draft)" if self.draft else ""
        text += f", keys and values {_amount(self.per_token)} a token"
        if self.peak is None:
            return text
        whole = "resident in this process, Python included" if self.peak_of == "process" else f"on {self.peak_of}"
        return f"{text}; peak {_amount(self.peak)} {whole}"


def memory_of(pair: Pair) -> MemoryUse:
    """Count the memory of a pair and read the peak so far; after decoding that is the peak of decoding.

    Args:
        pair: loaded, with or without a draft.
    """
    model = pair.draft.model if isinstance(pair.draft, ModelDrafter) else None
    target = dict(_parts(pair.target.model))
    draft = {} if model is None else dict(_parts(model.model))
    beside = sum(size for place, size in draft.items() if place not in target)
    per_token = _bytes_per_token(pair.target) + (0 if model is None else _bytes_per_token(model))
    peak, peak_of = _peak(pair.target.model)
    table = int(getattr(pair.draft, "nbytes", 0))
    return MemoryUse(pair.name, sum(target.values()), beside + table, per_token, peak, peak_of)


def _parts(model: nn.Module) -> Iterator[tuple[object, int]]:
    """Every storage of a model's weights with its bytes, by what tells it from others."""
    with only_looking():
        tensors = (*model.parameters(), *model.buffers())
    for tensor in tensors:
        storage = tensor.untyped_storage()
        yield (tensor.device, storage.data_ptr()), storage.nbytes()
    for module in model.modules():
        if isinstance(module, PrepackedLinear):
            yield module, module.nbytes


def _bytes_per_token(model: LanguageModel) -> int:
    trial = model.fresh()
    trial.forward(torch.zeros(1, dtype=torch.int64, device=model.device))
    return trial.cache_bytes


def _peak(model: nn.Module) -> tuple[int | None, str]:
    with only_looking():
        devices = sorted({str(weight.device) for weight in model.parameters() if weight.device.type == "cuda"})
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices), " and ".join(devices)
    return _peak_resident(), "process"


def _peak_resident() -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ImportError:  # Windows
        return None
    usage: Any = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _amount(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
