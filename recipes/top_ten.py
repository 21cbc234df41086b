"""``python -m recipes.top_ten``: add the column `top_ten` to traces of an earlier version, by their draft alone.

    python -m recipes.top_ten envs/data/traces/*.npz

The draft model reads the recorded texts with the recorded drafts hanging from them. Nothing is drafted anew, so that
all other columns stay; the recorded confidence tells whether it is the draft of that time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from specgym.decoding import LanguageModel, ModelDrafter, TextRules, TokenTree, likeliest_of_ten, sampling_of
from specgym.envs import Trace
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.draft_recorder import STRETCH
from specgym.envs.recordings.find import find_trace, record_command

from . import run

_ROUNDING = 0.005
"""Error of a recorded number, as a share of it."""


@dataclass(frozen=True)
class TopTenSettings:
    """Add the column `top_ten` to traces of an earlier version; one that has it is left alone, and one whose draft has
    no probabilities, too."""

    traces: tyro.conf.Positional[tuple[Path, ...]]
    """Files of traces."""


def add_top_ten(settings: TopTenSettings) -> None:
    """Add the column.

    Raises:
        TraceError: the draft is another than the recorded one.
    """
    for path in settings.traces:
        trace = Trace.load(path)
        if trace.top_ten is None:
            replace(trace, top_ten=_top_ten(trace, path)).save(path)


@torch.inference_mode()
def _top_ten(trace: Trace, path: Path) -> NDArray[np.float32]:
    named = find_trace(trace, trace.info.workload)[1]
    pair = named.load()
    drafter = pair.draft
    assert isinstance(drafter, ModelDrafter)
    if drafter.digest() != trace.info.draft_sha256:
        raise TraceError(
            f"{path} was recorded with another draft than {drafter.name} is now; record it again: "
            f"{record_command(named.name)}"
        )
    sampling = sampling_of(pair, named.sampling)
    columns = []
    for number, prompt in enumerate(tqdm(named.prompt_ids()[: trace.prompts], path.name, unit="prompt")):
        texts = slice(trace.starts[number], trace.starts[number + 1])
        rules = TextRules.of(pair, prompt, trace.info.tokens, sampling)
        draft = rules.drafter(drafter, rules.target(pair.target))
        assert isinstance(draft, ModelDrafter)
        model = draft.model.fresh()
        model.read(prompt[:-1])
        context = [prompt[-1], *trace.text[texts].tolist()]
        for start in range(0, len(context) - 1, STRETCH):
            stretch = context[start : min(start + STRETCH, len(context) - 1)]
            rows = slice(texts.start + start, texts.start + start + len(stretch))
            scores = _scores(model, stretch, trace.tokens[rows])
            p = scores.softmax(-1) if sampling.greedy else sampling.probabilities(scores)
            if not np.allclose(p.amax(-1).numpy(), trace.confidence[rows], rtol=_ROUNDING, atol=1e-6):
                raise TraceError(
                    f"{path}: the draft is not as sure of its tokens as was recorded; record it again: "
                    f"{record_command(named.name)}"
                )
            columns.append(likeliest_of_ten(scores).numpy())
    return np.concatenate(columns)


def _scores(model: LanguageModel, stretch: list[int], tokens: NDArray[np.int64]) -> torch.Tensor:
    """Scores that each drafted token was chosen from, shape (positions, K, vocabulary); the stretch stays read."""
    positions, longest = tokens.shape
    branches = tokens[:, :-1].ravel()  # nothing is drafted after the last
    first = positions + np.arange(positions)[:, None] * (longest - 1)
    parents = np.concatenate([np.arange(positions)[:, None], first + np.arange(longest - 2)], axis=1)
    nodes = torch.tensor([*stretch, *branches.tolist()])
    tree = TokenTree([*range(-1, positions - 1), *parents.ravel().tolist()])
    scores = model.forward(nodes, tree).scores
    model.keep(range(positions))
    after = scores[positions:].reshape(positions, longest - 1, -1)
    return torch.cat([scores[:positions, None], after], dim=1)


if __name__ == "__main__":
    run("top_ten", TopTenSettings, add_top_ten)
