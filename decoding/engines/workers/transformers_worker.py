"""A worker that decodes with transformers: plainly, assisted by a draft model, or by prompt lookup."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


class Worker:
    """Models in float32 on the CPU, and texts of them. Its methods answer requests of `loop.py`."""

    def load(self, target: str, draft: str | None, threads: int | None) -> dict[str, Any]:
        """Load the models.

        Args:
            target: folder that `save_pretrained` wrote, or hub id.
            draft: likewise; None for none.
            threads: of torch; None for its default.

        Returns:
            The package's version, or why the draft is refused.
        """
        transformers.logging.set_verbosity_error()
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = {"target": target} if draft is None else {"target": target, "draft": draft}
        models: dict[str, Any] = {}
        for role, name in loaded.items():
            try:
                models[role] = AutoTokenizer.from_pretrained(name), _model(name)
            except (OSError, ValueError) as error:
                return {"refused": f"the {role} {name} is no folder or hub id that it can load: {error}"}
        self.tokenizer, self.target = models["target"]
        self.draft: Any = None
        if draft is not None:
            tokenizer, self.draft = models["draft"]
            if reason := self._mismatch(tokenizer):
                return {"refused": f"draft {draft} {reason}"}
        # The candidate generators are made anew for every text, and here is the one place that they all pass.
        self._generator_of = self.target._get_candidate_generator
        self.target._get_candidate_generator = self._counted
        return {"version": transformers.__version__}

    def _mismatch(self, draft_tokenizer: Any) -> str:
        """Why a draft cannot propose tokens of the target; empty if it can."""
        rows = [int(model.config.get_text_config().vocab_size) for model in (self.target, self.draft)]
        if rows[0] != rows[1]:
            numbers = f"has {rows[1]} tokens and the target {rows[0]}"
        elif draft_tokenizer.get_vocab() != self.tokenizer.get_vocab():
            numbers = "numbers its tokens otherwise than the target"
        else:
            return ""
        return (
            f"{numbers}: transformers then wants both tokenizers, and prunes the draft's output layer when it samples, "
            "for good, so that a text changes those after it. Give a draft of the target's family"
        )

    def chat_prompt(self, message: str) -> list[int] | None:
        """Return the token ids of a user's message in the chat template; None where the tokenizer has none."""
        if self.tokenizer.chat_template is None:
            return None
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    def generate(
        self,
        prompt: str | list[int],
        settings: dict[str, Any] | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> dict[str, Any]:
        """Generate a text.

        Args:
            prompt: a string, or token ids.
            settings: by transformers' names; None for plain decoding.
            max_new_tokens: at most.
            temperature: 0 for greedy decoding. Nothing else shapes the distribution.
            seed: of sampling.

        Returns:
            The fields of `EngineText`.
        """
        encoded = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not encoded:
            return {"refused": "the prompt has no tokens"}
        ids = torch.tensor([encoded])
        arguments: dict[str, Any] = {}
        if settings is not None and self.draft is None:
            arguments = settings
        elif settings is not None:
            # AssistedCandidateGenerator reads them from here alone; as arguments of the target's `generate` they are
            # ignored (transformers 5.23.0, generation/candidate_generator.py).
            self.draft.generation_config.update(num_assistant_tokens_schedule="constant", **settings)
            arguments = {"assistant_model": self.draft}
        if temperature:
            arguments |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        else:
            arguments |= {"do_sample": False}
        torch.manual_seed(seed)
        self._counts = _Counts(settings is not None)
        clock = _Clock()
        with torch.inference_mode():
            output: Any = self.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=_first(self.target.generation_config.eos_token_id),
                streamer=clock,
                **arguments,
            )
        tokens = output[0, ids.shape[1] :].tolist()
        return {
            "text": self.tokenizer.decode(tokens, skip_special_tokens=True),
            "tokens": tokens,
            "new_tokens": len(tokens),
            **clock.fields(),
            **self._counts.fields(),
        }

    def _counted(self, *arguments: Any, **keywords: Any) -> Any:
        """A candidate generator of transformers that counts what it drafts and what is accepted."""
        generator = self._generator_of(*arguments, **keywords)
        draft, learn, counts = generator.get_candidates, generator.update_candidate_strategy, self._counts

        def get_candidates(input_ids: torch.Tensor, *rest: Any, **others: Any) -> Any:
            candidates = draft(input_ids, *rest, **others)
            counts.drafted += candidates[0].shape[1] - input_ids.shape[1]
            return candidates

        def update_candidate_strategy(input_ids: torch.Tensor, scores: torch.Tensor, num_matches: Any) -> None:
            counts.add(int(num_matches))
            learn(input_ids, scores, num_matches)

        generator.get_candidates = get_candidates
        generator.update_candidate_strategy = update_candidate_strategy
        return generator


class _Counts:
    """Counts of a text's draft tokens; None in all fields where there is no draft."""

    def __init__(self, drafting: bool) -> None:
        self.drafting = drafting
        self.drafted = self.rounds = 0
        self.places: list[int] = []

    def add(self, matches: int) -> None:
        """Count a round that accepted some tokens."""
        self.rounds += 1
        self.places += [0] * (matches - len(self.places))
        for place in range(matches):
            self.places[place] += 1

    def fields(self) -> dict[str, Any]:
        """Return fields of `EngineText`."""
        if not self.drafting:
            return {}
        accepted = sum(self.places)
        return {
            "drafted": self.drafted,
            "accepted": accepted,
            "rounds": self.rounds,
            "accepted_by_place": self.places,
        }


class _Clock:
    """A streamer that notes when tokens come: the prompt's first, and then those of every round at once."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.first = self.last = 0.0
        self.first_tokens = self.puts = 0

    def put(self, value: torch.Tensor) -> None:
        """Note the time of some tokens."""
        self.last = time.perf_counter()
        if self.puts == 1:
            self.first, self.first_tokens = self.last, value.numel()
        self.puts += 1

    def end(self) -> None:
        """Do nothing: the last tokens have come already."""

    def fields(self) -> dict[str, Any]:
        """Return fields of `EngineText`."""
        return {
            "seconds": self.last - self.first,
            "prompt_seconds": self.first - self.begin,
            "first_tokens": self.first_tokens,
        }


def _model(name: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(name)
    return model.float().eval()


def _first(ids: Any) -> Any:
    return ids[0] if isinstance(ids, list) else ids
