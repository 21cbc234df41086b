"""One Hugging Face causal LM with a key/value cache that can branch and be cut back."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import PromptError, UnsupportedModelError
from .attention import EVERYWHERE_FULL, MaskMaker, numbers
from .captured import CapturedPasses
from .joint.cache import JointCache, Slot
from .joint.joining import AT_WORK, JoinedText
from .joint.passes import JoinedPasses
from .kv_cache import BranchingCache, RestorableCache, TokenTree, stored_bytes
from .linear_layers import (
    NARROWEST_PREPACKED,
    SMALLEST_PREPACKED,
    can_prepack,
    only_looking,
    prepack_linears,
    unpack_changed_output,
    unpack_linears,
)
from .output_layer import Logits, output_layer_watched
from .supported import causal_model, execution_device, refuse_unsupported, require_ready
from .trial import Reading, Role, declared_context, settle

_PART = 512
_MOST_REREAD = 16  # tokens that are read again with every pass, until it costs less to read them in one of their own


class LanguageModel:
    """A causal language model that reads tokens one span at a time, and can take any of them back.

    One text; those of a batch share passes (`models/joint`). Trees go through the public 4-D attention mask and
    position ids, so no architecture is patched. One that gives other results so, at the edges of its windows maybe,
    is read in chains, by masks and a cache that it makes itself, or else refused; both are tried out (`trial.settle`).

    Attributes:
        branches: whether trees of candidates can be verified; otherwise chains alone can.
        why_no_branches: the reason, where they cannot; empty where they can.
        exact: whether passes of all shapes give the same scores. A target's have to; a draft may round by the pass.
        restores_states: whether layers are recurrent: after tokens were taken back, those that stay are read again.
        context_limit: tokens of the longest text.
        source: what an encoder has read for this text; empty where there is none.
        source_limit, source_vocabulary: tokens of its longest source, and ids that there are; None without an encoder.
        mask_seconds: how long building the mask of the last pass took.
        captured: passes over few tokens (`CapturedPasses`); None where all are the model's own.
        kept: hands over what is kept of the last pass beside scores, shape (texts, tokens, width); None for nothing.
        masks: makes the masks of passes.
        parameters: names of what the model's `forward` takes.

    Args:
        model: any transformers causal LM. It is put into evaluation mode.
        prepack: pack the large linear layers' weights for a CPU, *in place* (see `PrepackedLinear`; `unpack` undoes
            it): in float16 where they keep every number so, by default at any width, and otherwise in oneDNN's layout,
            by default targets at least 512 wide. With False the model is left untouched.
        role: what is asked of it: of a draft not that it be `exact`, since what it proposes is verified.

    Raises:
        UnsupportedModelError: the architecture cannot be decoded speculatively.
        NumericalError: the model's weights give NaN.
    """

    branches = True
    exact = True
    why_no_branches = ""
    restores_states = _forced = False
    _reading = Reading(EVERYWHERE_FULL)
    source: tuple[int, ...] = ()
    source_limit: int | None = None
    source_vocabulary: int | None = None
    captured: CapturedPasses | None = None
    kept: Callable[[], Tensor] | None = None
    joint_passes: type[JoinedPasses] = JoinedPasses
    _joined: JoinedText | None = None
    _smallest_blocked: int | None = SMALLEST_PREPACKED

    def __new__(cls, model: object = None, *args: object, **options: object) -> Self:
        """Make an `EncoderDecoder` of a model that has an encoder."""
        from .encoder.encoder_decoder import class_of  # which imports this module

        return cast("Self", object.__new__(class_of(model) if cls is LanguageModel else cls))

    def __init__(self, model: PreTrainedModel, *, prepack: bool | None = None, role: Role = "target") -> None:
        refuse_unsupported(causal_model(model, role), exact=role == "target")
        self._set_up(model.eval(), Reading(EVERYWHERE_FULL))
        if prepack and not can_prepack(model):
            raise ValueError(
                f"{self.name} ({self.dtype} on {self.device}) cannot be prepacked: that needs float32 (or bfloat16, "
                "where oneDNN supports it) on CPU. Leave `prepack` unset."
            )
        # A draft reads a token a pass, which is no faster blocked.
        self._smallest_blocked = None if role == "draft" else SMALLEST_PREPACKED
        if prepack is not False and can_prepack(model):
            wide = prepack or self.hidden_size >= NARROWEST_PREPACKED
            prepack_linears(model, self._smallest_blocked if wide else None)
        self._set_up(model, settle(model, LanguageModel.as_read, role))
        if self.branches and self.device.type == "cpu" and self._reading.switch is None:
            self.captured = CapturedPasses(model, self.masks.masks)

    @classmethod
    def as_read(cls, model: PreTrainedModel, reading: Reading) -> LanguageModel:
        """Wrap a model that is read in a certain way, without trying whether that is right."""
        wrapped = cls.__new__(cls)
        wrapped._set_up(model, reading)
        return wrapped

    def _set_up(self, model: PreTrainedModel, reading: Reading) -> None:
        config = model.config.get_text_config(decoder=True)
        self.model = model
        self.name = getattr(model, "name_or_path", "") or type(model).__name__
        self.vocabulary_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
        with only_looking():  # of a part of a model the first weight may be packed
            self.device, self.dtype = execution_device(model), model.dtype
        self.context_limit = min(declared_context(config), reading.context_limit)
        self.branches, self.exact = reading.spans is not None, reading.exact
        self._reading, self.why_no_branches, self.mask_seconds = reading, reading.why_no_branches, 0.0
        self.masks = MaskMaker(reading.spans or EVERYWHERE_FULL, self.dtype, self.device)
        self.parameters = frozenset(inspect.signature(model.forward).parameters)
        self._forget()

    def _forget(self) -> None:
        cache = BranchingCache() if self.branches else RestorableCache(self.model.config)
        self._cache: BranchingCache | RestorableCache | Slot = cache
        self.restores_states = isinstance(self._cache, RestorableCache) and self._cache.has_states
        # Kept where what was read may have to be read again: after a switch of the rotation, or to restore states.
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        self._text = nothing if self.restores_states or self._reading.switch else None
        self._last_start, self._at_once, self._beyond = 0, 0, False

    def fresh(self) -> LanguageModel:
        """Share the weights, with an empty cache: how every text begins.

        Raises:
            UnsupportedModelError: the model has been switched since to something that decodes wrongly.
        """
        require_ready(self.model, self.dtype, self.device, self.exact)
        unpack_changed_output(self.model)
        if self.captured is not None:
            self.captured.renew()
        other, text = copy.copy(self), AT_WORK.get()
        other._forget()
        other._joined = None if text is None or not self.joinable else text.joined(other)
        return other

    @property
    def joinable(self) -> bool:
        """True if passes over several texts can be joined: a text has nothing but keys and values."""
        return type(self) is LanguageModel and self.branches and self._text is None

    def move_into(self, joint: JointCache) -> Slot:
        """Keep what is read in a joint cache from now on; for models that are `joinable`."""
        if isinstance(self._cache, BranchingCache):
            self._cache = joint.admit(self._cache.extended(0) or (), self._cache.length)
        return cast("Slot", self._cache)

    def begin(self, prompt: Sequence[int]) -> tuple[LanguageModel, list[int]]:
        """Return the model as it reads the text of a prompt, and the first tokens of that text: here the prompt."""
        return self, list(prompt)

    def pack(self) -> None:
        """Prepack the large linear layers that are plain, where the model's device and type allow it."""
        if self.captured is not None:
            self.captured.graphs.clear()  # they hold the plain weights, and weights that are held are left alone
        prepack_linears(self.model, self._smallest_blocked)

    def unpack(self) -> None:
        """Give the linear layers their plain weights back, for good; texts stay the same, passes take longer."""
        unpack_linears(self.model)

    def require_branches(self, role: str) -> None:
        """Refuse a model that cannot verify trees of candidates, for a use in which it has to.

        Args:
            role: what the model would be, for the message.

        Raises:
            UnsupportedModelError: it can be read in chains alone; the message says why.
        """
        if not self.branches:
            raise UnsupportedModelError(
                f"{self.name} cannot be {role}, for which trees of candidates are read: {self.why_no_branches}. It can "
                "read chains: use SpeculativeDecoder, ThresholdDecoder or JacobiDecoder."
            )

    @property
    def length(self) -> int:
        """Number of tokens that were read and not taken back."""
        return self._cache.length if self._text is None else self._text.shape[0]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of the tokens in the cache, without what is held ready for more."""
        return self._cache.nbytes if isinstance(self._cache, Slot) else sum(map(stored_bytes, self._cache.layers))

    @property
    def is_plain(self) -> bool:
        """True if all layers see equally far, whatever the position, and keep nothing but keys and values."""
        return set(self._reading.spans or ()) == {""} and self._reading.switch is None

    def room(self, text: Sequence[int]) -> int:
        """Tokens that can still be read after a text whose beginning is in the cache; negative if it is too long."""
        return self.context_limit - len(text)

    def pass_limit(self, start: int) -> int:
        """Length of text that a pass over the tokens from position `start` on may reach.

        That is the context's limit, or the place before it where the model's rotation of positions switches (longrope):
        stock decoding reads the tokens on either side of it in passes of their own.
        """
        switch = self._reading.switch
        return switch.position if switch is not None and start < switch.position else self.context_limit

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
        """Read tokens after those in the cache, and append them to it.

        Args:
            tokens: shape (tokens,), integer ids on the model's device.
            tree: how the tokens hang together; by default each follows the one before it. A tree with more nodes than
                there are tokens is one that grows: its first nodes are the last tokens in the cache, the rest are new.
            last: return only this many last rows of scores, for instance 1 for a prompt; by default all.
            rows: return the scores of these tokens alone, shape (wanted,), int64, on the model's device. The output
                layer, dear where the vocabulary is large, does no other work.
            hidden: also return the last hidden states of the tokens whose scores are returned.

        Raises:
            PromptError: the text would grow past the model's context limit.
            UnsupportedModelError: the tree has branches, and the model can be read in chains alone.
            ValueError: a growing tree does not fit the number of tokens.
        """
        cached, count = self.length, tokens.shape[0]
        start = cached if tree is None else cached + count - len(tree)
        end = start + (count if tree is None else tree.height)
        if end > self.context_limit:
            raise PromptError(
                f"{self.name} has a context of {self.context_limit} tokens; {start} are cached and {end - start} more "
                "were given. Shorten the prompt or generate fewer tokens."
            )
        if tree is not None and not 0 <= start <= cached:
            raise ValueError(
                f"a tree of {len(tree)} nodes cannot end in {count} new tokens after {cached} in the cache"
            )
        if tree is not None and not self.branches:
            if not tree.is_chain:
                self.require_branches("read in this shape")
            tree = None
        self._switch_if_due(end)
        self._last_start = start
        if self._text is None:
            return self._pass(tokens, tree, start, last, rows, hidden)
        unread = self._text[self._cache.length :]  # what stayed when states were restored
        if isinstance(self._cache, RestorableCache):
            if unread.shape[0] > _MOST_REREAD and (self._cache.length or not self._at_once):
                self._pass(unread, None, self._cache.length, 1, None, False)
                unread = unread[:0]
            if not unread.shape[0]:
                self._cache.save()
        self._text = torch.cat([self._text, tokens])
        if not unread.shape[0]:
            return self._pass(tokens, tree, start, last, rows, hidden)
        if rows is not None:
            rows = rows + unread.shape[0]
        elif last is None:
            last = count
        return self._pass(torch.cat([unread, tokens]), None, self._cache.length, last, rows, hidden)

    def _pass(
        self, tokens: Tensor, tree: TokenTree | None, start: int, last: int | None, rows: Tensor | None, hidden: bool
    ) -> Logits:
        """Read tokens behind what the cache holds; arguments as for `forward`, and where they begin."""
        if self._joined and (joined := self._joined.read(tokens, tree, start, last, rows, hidden)):
            return Logits(*joined)
        at_once = 1 if start else self._at_once or tokens.shape[0]
        if self._reading.singly and tokens.shape[0] > at_once:
            return self._read_singly(tokens, at_once, last, rows, hidden)
        started = time.perf_counter()
        count, end = tokens.shape[0], start + tokens.shape[0]
        positions = numbers(end, self.device)[start:end] if tree is None else tree.on(self.device)[0][-count:] + start
        chosen = (last or 0) if rows is None else rows
        switch = self._reading.switch
        decided = self._forced and switch is not None and end <= switch.position
        if switch is not None and decided:
            # The rotation goes by the last position of a pass: one more token, which no other sees, decides it.
            tokens, count = torch.cat([tokens, tokens[-1:]]), count + 1
            positions = torch.cat([positions, positions.new_tensor([switch.position])])
            chosen = positions[: end - start] - start if isinstance(chosen, int) else chosen
            chosen = chosen[-last:] if last else chosen
        arguments: dict[str, object] = {"input_ids": tokens.unsqueeze(0), "use_cache": True}
        if self.branches:
            arguments["attention_mask"] = self.masks.masks(tree, start, count)
        if "position_ids" in self.parameters:
            arguments["position_ids"] = positions.unsqueeze(0)
        if "logits_to_keep" in self.parameters:
            arguments["logits_to_keep"] = chosen
        self.mask_seconds = time.perf_counter() - started
        if self.captured is not None:
            mask, cache = arguments.get("attention_mask"), self._cache
            if (outputs := self.captured.run(tokens, positions, mask, cache, chosen, hidden)) is not None:
                return Logits(outputs[0].float(), outputs[1] if hidden else None)
        name = "past_key_values" if "past_key_values" in self.parameters else "cache_params"
        arguments[name] = self._cache.as_cache(count) if isinstance(self._cache, Slot) else self._cache
        with output_layer_watched(self.model, hidden) as states:
            output = self.model(**arguments)
        if self.captured is not None:
            self.captured.took(time.perf_counter() - started - self.mask_seconds)
        if isinstance(self._cache, RestorableCache):
            self._cache.length = start + count
        if decided:
            self._cache.cut(end)
        scores, read = output.logits[0], states[-1][0] if hidden else None
        if "logits_to_keep" not in self.parameters:
            kept = slice(-chosen, None) if isinstance(chosen, int) else chosen
            scores, read = scores[kept], None if read is None else read[kept]
        return Logits(scores.float(), read)

    def _read_singly(self, tokens: Tensor, at_once: int, last: int | None, rows: Tensor | None, hidden: bool) -> Logits:
        """Read the first tokens at once and the rest in passes of their own; the first but one are not asked about."""
        start = self._cache.length
        passes = [self._pass(tokens[:at_once], None, start, 1, None, hidden)]
        if isinstance(self._cache, RestorableCache) and not start:
            self._cache.save()
        for place in range(at_once, tokens.shape[0]):
            passes.append(self._pass(tokens[place : place + 1], None, start + place, 1, None, hidden))
        scores = torch.cat([result.scores for result in passes])
        states = torch.cat([result.hidden for result in passes if result.hidden is not None]) if hidden else None
        kept = slice(-(last or 0), None) if rows is None else rows - (at_once - 1)
        return Logits(scores[kept], None if states is None else states[kept])

    def read(self, tokens: Sequence[int], *, hidden: bool = False, of: int | None = None) -> Tensor | None:
        """Append a text to the cache, in parts, so that no mask is as long as it is wide. Errors as `forward`.

        Args:
            tokens: of the text, ids.
            hidden: return the hidden state of its last token, shape (hidden size,).
            of: tokens of the whole prompt that these begin; by default they are all of it.
        """
        state: Tensor | None = None
        switch, whole = self._reading.switch, of or self.length + len(tokens)
        if switch is not None and whole > switch.position and (switch.rereads or not self.length):
            self._switch_if_due(whole)
            self._forced = self._beyond = True  # a prompt is read in the way of its last token
        if self._reading.singly and not self.length and not hidden:
            # Stock decoding reads a prompt at once, its last token included: that is done when the last token comes.
            self._text, self._at_once = torch.tensor(tokens, device=self.device), of or len(tokens)
            return None
        try:
            for start in range(0, len(tokens), _PART):
                part = torch.tensor(tokens[start : start + _PART], device=self.device)
                state = None if (states := self.forward(part, last=1, hidden=hidden).hidden) is None else states[-1]
        finally:
            self._forced = False
        return state

    def _switch_if_due(self, end: int) -> None:
        """Read the text again in the other way, if a pass that ends here is the first on that side of the switch."""
        switch, text = self._reading.switch, self._text
        if switch is None or text is None or not switch.rereads or self._forced:
            return
        if self._beyond == (end > switch.position):
            return
        self._forget()
        self._beyond = end > switch.position
        if text.shape[0]:
            self.read(text.tolist(), of=end)

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """Keep only the tokens (or tree nodes) in `path`, ascending, from the last forward pass; drop the rest."""
        if not isinstance(self._cache, RestorableCache):
            self._cache.gather(self._last_start, list(path))
        if self._text is not None:
            rows = torch.tensor(path, dtype=torch.int64, device=self.device) + self._last_start
            self._text = torch.cat([self._text[: self._last_start], self._text[rows]])
        if not self.branches:
            self._cache.cut(self._last_start + len(path))

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if isinstance(self._cache, RestorableCache) and length < self._cache.saved_length:
            self._cache = RestorableCache(self.model.config)  # read again from the beginning
        self._cache.cut(length)
        if self._text is not None:
            self._text = self._text[:length]
