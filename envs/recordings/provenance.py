"""What every recording says of where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from specgym.decoding import Sampling


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which models decoded which prompts, and how tokens were chosen."""

    workload: str
    split: str
    target: str
    target_sha256: str
    """Over the names and values of all weights."""
    draft: str
    """Empty, like the next, for a decoder that drafts nothing."""
    draft_sha256: str
    temperature: float
    top_k: int
    top_p: float
    prompts_sha256: str
    """Of the prompt set (`PromptSet.digest`)."""
    draft_length: int
    """K, the most tokens drafted at a position; 0 for a decoder that drafts no chains."""
    tokens: int
    """Of each of the target's texts, at most."""
    seed: int
    """Of all sampling, and of a design."""
    specgym: str
    torch: str
    transformers: str

    @property
    def sampling(self) -> Sampling:
        """How tokens were chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p)
