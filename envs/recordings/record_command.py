"""The command line of ``python -m specgym.envs.record``: which options there are for which kind of recording."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from specgym.decoding import Split, traits_of

from .archive import TraceError

_OF_TRACES = ("draft_length", "prompts", "tokens", "detour_prompts", "detour_tokens", "seed")
_OF_OUTCOMES = ("settings", "refine", "draft_length", "prompts", "tokens", "seed")


@dataclass(frozen=True)
class RecordCommand:
    """Record what a pair's draft would do at every position of texts; or, with --decoder, what a decoder does with many
    settings of its knobs. Either can be replayed in NumPy, without the models."""

    workloads: tyro.conf.Positional[tuple[str, ...]]
    """pair/prompts or pair/prompts@temperature; several may be given."""
    decoder: str | None = None
    """Record outcomes of this decoder (lookahead, medusa, medusa-typical or draft-tree, or threshold or speculative,
    which can do with a trace); by default a trace of the draft."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder of the files, each named after its workload and split; by default traces, or outcomes."""
    splits: tuple[Split, ...] = ("train", "test")
    """Whose prompts to record; every split has a file of its own."""
    threads: int = 0
    """torch's threads; 0 for torch's own choice."""
    settings: int | None = None
    """Outcomes: settings of the knobs, the default and the presets among them (48)."""
    refine: int | None = None
    """Outcomes: settings beyond those, where the recorded ones say that decoding is fastest (0)."""
    draft_length: int | None = None
    """Tokens drafted at every position, K (16); not for the others, which draft no chains."""
    prompts: int | None = None
    """Prompts of the split, at most; the first ones (24, or 12 for outcomes)."""
    tokens: int | None = None
    """Of the text after each prompt, at most (64)."""
    detour_prompts: int | None = None
    """Traces: prompts for which the texts that threshold decoding leads to are recorded too, at most; 0 for none
    (12)."""
    detour_tokens: int | None = None
    """Traces: of each of those texts, at most (32)."""
    seed: int | None = None
    """Of all sampling, and of the choice of the settings (0)."""

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self.out or Path("traces" if self.decoder is None else "outcomes")

    def given(self) -> dict[str, int]:
        """The numbers given, by name, for `RecordSettings` or `OutcomeSettings`.

        Raises:
            TraceError: one does not apply to this kind of recording.
        """
        names = dict.fromkeys((*_OF_TRACES, *_OF_OUTCOMES))
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name in given:
            option = f"--{name.replace('_', '-')}"
            if self.decoder is None and name not in _OF_TRACES:
                raise TraceError(f"{option} is for outcomes; give --decoder, or leave it out to record a trace")
            if self.decoder is not None and name not in _OF_OUTCOMES:
                raise TraceError(f"{option} is for traces; leave it out, or leave out --decoder {self.decoder}")
            if name == "draft_length" and self.decoder is not None and not traits_of(self.decoder).drafts_chains():
                raise TraceError(f"{option}: {self.decoder} drafts no tokens one after another; leave it out")
        return given
