"""A target and its draft, or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafts.cascade import CascadeDrafter
from ..drafts.copying import PromptLookupDrafter, SuffixDrafter
from ..drafts.drafter import Drafter, ModelDrafter
from ..drafts.eagle.drafter import EagleDrafter
from ..drafts.eagle.files import load_head
from ..drafts.eagle.head import EagleHead
from ..drafts.eagle.passes import HeadPasses
from ..drafts.eagle.target import keeping_states
from ..drafts.mixed import MixedDraft, draft_models, drafts_of, with_models
from ..drafts.ngram import NGramDrafter
from ..drafts.translated import TranslatedModel
from ..drafts.translation import Translation, Vocabulary, highest_id
from ..errors import ArgumentError, PromptError, UnsupportedModelError, VocabularyMismatchError
from ..models.captured import CapturedPasses
from ..models.early_exit import EarlyExit, ExitModel, resuming, whole
from ..models.encoder.encoder_decoder import with_source_of
from ..models.language_model import LanguageModel
from ..models.supported import causal_model
from . import presets
from .find_model import identity, load_model, placement
from .quantise import quantise

AnyDraft: TypeAlias = PreTrainedModel | LanguageModel | Drafter | EarlyExit | EagleHead | Path
"""Anything that `Pair` takes for a draft."""
_TABLES = Path(__file__).parents[1] / "data" / "ngrams"
_SHIPPED_TABLES = {"tiny-10m": "tiny", "tiny-3m": "tiny", presets.SMOLLM2: "smollm2", "smollm2": "smollm2"}


class Pair:
    """A target model with the draft that proposes tokens for it.

    Args:
        target: a Hugging Face causal LM.
        draft: a smaller model, `EarlyExit`, an `EagleHead` or its folder (a `Path`), or any `Drafter`; several of them
            in the order of preference (`MixedDraft`); None where no draft is needed.
        tokenizer: the target's; optional. With it, prompts may be strings and generations carry text.
        draft_tokenizer: the draft's, if it is a model; by default the target's. With another one the draft proposes the
            tokens that both have, and the text is still the target's (`TranslatedModel`). Neither tokenizer is needed
            where both models have the same vocabulary. Of several drafts one each, or one for all.
        name: how reports call the pair; by default made from the models' names.
        prepack: see `LanguageModel`. On CPU the large linear layers of target and draft are packed in place unless
            this is False (`unpack` undoes it); True asks the same of the target and is no more for the draft.

    Raises:
        ArgumentError: a sequence of drafts is empty, or has not as many tokenizers.
        VocabularyMismatchError: the draft's tokens cannot be told in terms of the target's.
        UnsupportedModelError: a model cannot be decoded speculatively, or is none.
    """

    def __init__(
        self,
        target: PreTrainedModel | LanguageModel,
        draft: AnyDraft | Sequence[AnyDraft] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        draft_tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
        name: str | None = None,
        prepack: bool | None = None,
    ) -> None:
        if not isinstance(target, LanguageModel):
            target = LanguageModel(causal_model(target), prepack=prepack)
        if not target.exact:
            raise UnsupportedModelError(f"{target.name} was made as a draft; make the target of a pair from its model")
        self.draft = _drafter(target, draft, tokenizer, draft_tokenizer, prepack)
        self.target = _beside_its_drafts(target, self.draft)
        self.tokenizer = tokenizer
        self.name = name or (f"{target.name}+{self.draft.name}" if self.draft is not None else target.name)
        self.eos_token_ids = _eos_token_ids(target.model, tokenizer)

    def unpack(self) -> None:
        """Give the target and the draft their plain weights back: a CPU then takes longer for passes over few tokens.

        Anything that asks for a packed weight gets it (`state_dict`, `parameters`, `to`, `train`, `copy.deepcopy`,
        pickle, merging an adapter), layer by layer and with a warning; this does it for all layers at once.
        """
        for model in (self.target, *draft_models(self.draft)):
            model.unpack()
        for drafter in _heads(self.draft):
            drafter.head.unpack()

    def pack(self) -> None:
        """Prepack the large linear layers of target and draft that are plain, where device and type allow it."""
        for model in (self.target, *draft_models(self.draft)):
            model.pack()
        for drafter in _heads(self.draft):
            drafter.head.pack()

    @contextlib.contextmanager
    def capturing(self, after: int) -> Iterator[None]:
        """Capture a shape of pass (`CapturedPasses`) as soon as it has come so often, within a block.

        Capturing takes as long as some 100 passes. Whoever times decoding lets it happen while warming up (1), and
        then no more (`NEVER`): in a process that decodes for long it does not count.

        Args:
            after: passes of a shape, at least 1.
        """
        several: list[CapturedPasses | HeadPasses] = [drafter.passes for drafter in _heads(self.draft)]
        several += [model.captured for model in (self.target, *draft_models(self.draft)) if model.captured is not None]
        before = [passes.patience for passes in several]
        try:
            for passes in several:
                passes.patience = after
            yield
        finally:
            for passes, patience in zip(several, before, strict=True):
                passes.patience = patience

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


def _drafter(
    target: LanguageModel,
    draft: AnyDraft | Sequence[AnyDraft] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    draft_tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
    prepack: bool | None,
) -> Drafter | None:
    """Return what drafts for a target, in its vocabulary. Arguments and errors as for `Pair`."""
    if isinstance(draft, Sequence):
        tokenizers = draft_tokenizer if isinstance(draft_tokenizer, Sequence) else [draft_tokenizer] * len(draft)
        if not draft or len(tokenizers) != len(draft):
            raise ArgumentError(f"{len(draft)} drafts have {len(tokenizers)} tokenizers; give a draft, and one each")
        parts = [_drafter(target, part, tokenizer, its, prepack) for part, its in zip(draft, tokenizers, strict=True)]
        drafts = [part for part in parts if part is not None]
        return drafts[0] if len(drafts) == 1 else MixedDraft(drafts)
    if isinstance(draft_tokenizer, Sequence):
        raise ArgumentError("several draft_tokenizers are for several drafts; give the draft's own")
    if isinstance(draft, Path):
        draft = load_head(draft, target, strict=False)
    if isinstance(draft, EagleHead):
        return EagleDrafter(draft, target, prepack=prepack is not False)
    if isinstance(draft, EarlyExit):
        return ModelDrafter(ExitModel(target, draft.layers))
    if isinstance(draft, nn.Module):
        draft = LanguageModel(causal_model(draft, "draft"), prepack=False if prepack is False else None, role="draft")
    if isinstance(draft, LanguageModel):
        draft = ModelDrafter(with_source_of(target, draft))
    return None if draft is None else _in_vocabulary(target, draft, tokenizer, draft_tokenizer)


def _heads(draft: Drafter | None) -> list[EagleDrafter]:
    """The EAGLE heads that draft, in order."""
    return [part for part in drafts_of(draft) if isinstance(part, EagleDrafter)]


def _beside_its_drafts(target: LanguageModel, draft: Drafter | None) -> LanguageModel:
    """A target as it reads a text in which some drafts work.

    Raises:
        ArgumentError: two EAGLE heads read other layers of it.
        UnsupportedModelError: a draft needs a target of another structure.
    """
    if draft is None:
        return whole(target)
    layers = {drafter.head.shape.layers for drafter in _heads(draft)}
    if len(layers) > 1:
        raise ArgumentError(f"EAGLE heads that read other layers of {target.name} cannot draft in one text: choose one")
    return keeping_states(target, layers.pop()) if layers else resuming(target, draft_models(draft))


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
    return with_models(draft, lambda model: _translated(target, model, tokenizer, draft_tokenizer or tokenizer))


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
            draft may also be ``prompt-lookup``, ``suffix``, ``ngram`` (a table that ships with the package), the path
            of a table made by ``python -m specgym.decoding.fit ngram`` or ``early-exit:6`` (`EarlyExit`), or several of
            these with commas between them. The folder of an EAGLE head drafts by it. A draft model whose name ends in
            ``:int8`` is quantised (`quantise`), and to one that ends in ``:drafted-by-suffix`` or the like that draft
            proposes (`CascadeDrafter`). A folder or ``owner/model`` is a target without a draft.
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

    def drafted_by(name: str) -> tuple[AnyDraft, PreTrainedTokenizerBase | None]:
        if name == presets.PROMPT_LOOKUP:
            return PromptLookupDrafter(vocabulary_size), None
        if name == presets.SUFFIX:
            return SuffixDrafter(vocabulary_size), None
        if name == presets.NGRAM:
            return NGramDrafter.load(_shipped_table(preset.target), name=presets.NGRAM), None
        if name.endswith(".safetensors"):
            return NGramDrafter.load(name), None
        name, _, _ = name.partition(presets.DRAFTED_BY)
        if name.startswith(presets.EARLY_EXIT):
            return EarlyExit(int(name.removeprefix(presets.EARLY_EXIT))), None
        base = name.removesuffix(presets.INT8)
        if head := presets.head_folder(base):
            return head, None
        # Loaded before anything is prepacked, so that a draft can still take the target's plain weights.
        load_draft = partial(load, base, shared_from=model)
        if base != name:
            load_draft = partial(_quantised, load_draft, name)
        return _loaded(models, (*identity(base), name == base, *key), load_draft)

    drafts = [drafted_by(name) for name in preset.drafts]
    target = LanguageModel(causal_model(model), prepack=prepack)
    for number, draft_name in enumerate(preset.drafts):
        _, _, inner_name = draft_name.partition(presets.DRAFTED_BY)
        if inner_name:
            inner, _ = drafted_by(inner_name)
            alone = _drafter(target, drafts[number][0], tokenizer, drafts[number][1], prepack)
            drafts[number] = CascadeDrafter(cast(ModelDrafter, alone), cast(Drafter, inner)), None
    return Pair(
        target,
        [draft for draft, _ in drafts] if drafts else None,
        tokenizer,
        draft_tokenizer=[tokens for _, tokens in drafts] if drafts else None,
        name=preset.name,
        prepack=prepack,
    )


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


def _quantised(
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]], name: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load()
    quantise(model)
    model.name_or_path = name
    return model, tokenizer


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
