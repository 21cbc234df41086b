"""Greedy text of every architecture equals `generate()`, through every window and switch; or the model is refused.

The text runs to the context's end where anything changes up to there. It is compared token for token, so no token may
be nearly tied: orders of float32 sums differ by 1e-6 standard deviations of the logits, and the closest tie in a text
is checked to be at least 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from specgym.decoding.decoder import Decoder
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.draft_tree.decoder import DraftTreeDecoder
from specgym.decoding.decoders.lookahead.decoder import JacobiDecoder, LookaheadDecoder
from specgym.decoding.errors import UnsupportedModelError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.rounds import Generation
from tests.helpers.architecture_chains import FAMILIES
from tests.helpers.architecture_page import page
from tests.helpers.architectures import CONTEXT, Case, Family, build
from tests.helpers.table_models import rehearsed_table

ROOT = Path(__file__).resolve().parents[3]
FEWEST_TOKENS = 8
"""Different tokens in a text, so that it depends on more than the last one."""
CLOSEST_TIE = 1e-4
DECODED = [pytest.param(family, case, id=str(case)) for family in FAMILIES if family.chains for case in family.cases]
REFUSED = [
    pytest.param(family, case, id=str(case)) for family in FAMILIES if not family.chains for case in family.cases
]


def generated(model: PreTrainedModel, prompt: Sequence[int], end: int) -> tuple[list[int], float]:
    """Text that `generate()` gives up to a length, prompt included, and its closest tie in standard deviations."""
    ids = torch.tensor([prompt])
    settings = GenerationConfig(
        max_length=end, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    stock: Any = model
    with torch.inference_mode():
        output = stock.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    logits = torch.cat(output.logits).float()
    first, second = logits.topk(2).values.unbind(-1)
    return output.sequences[0, len(prompt) :].tolist(), float(((first - second) / logits.std(-1)).min())


@pytest.mark.parametrize(("family", "case"), DECODED)
def test_greedy_text_equals_generate(make_noisy: Callable[..., PreTrainedModel], family: Family, case: Case) -> None:
    model = build(case)
    prompt = [5 + place % 60 for place in range(case.prompt or family.prompt)]
    end = CONTEXT if case.prompt else family.end
    expected, tie = generated(model, prompt, end)
    assert len(expected) == end - len(prompt)
    assert len(set(expected)) >= FEWEST_TOKENS
    assert tie > CLOSEST_TIE
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    pair = Pair(model, rehearsed_table(vocabulary, prompt + expected), prepack=False)
    assert pair.target.context_limit >= CONTEXT

    def decoded(kind: type[Decoder], pair: Pair = pair) -> Generation:
        generation = kind(pair).generate(prompt, max_new_tokens=len(expected))
        assert generation.tokens == expected, kind.__name__
        return generation

    decoded(AutoregressiveDecoder)
    for kind in (SpeculativeDecoder, DraftTreeDecoder)[: 1 + family.trees]:
        generation = decoded(kind)
        accepted = [round_.accepted for round_ in generation.rounds]
        assert max(accepted) >= 2, "and so more than one token of a draft is kept"
        assert any(few < round_.drafted for few, round_ in zip(accepted, generation.rounds, strict=True))
    if case in (family.cases[0], *(case for case in family.cases if case.attention or case.prompt)):
        decoded(LookaheadDecoder if family.trees else JacobiDecoder)
        its_kind = Pair(pair.target, make_noisy(model, 0.02), prepack=False)
        decoded(DraftTreeDecoder if family.trees else SpeculativeDecoder, its_kind)
    if not family.trees:
        for decoder in (LookaheadDecoder, DraftTreeDecoder):
            with pytest.raises(UnsupportedModelError, match=family.reason):
                decoder(pair)


@pytest.mark.parametrize(("family", "case"), REFUSED)
def test_what_cannot_be_decoded_is_refused_with_the_reason(family: Family, case: Case) -> None:
    model = build(case)
    with pytest.raises(UnsupportedModelError, match=family.reason):
        Pair(model)


def test_at_least_130_configurations_are_decoded() -> None:
    assert len(DECODED) >= 130
    cases = [str(case) for family in FAMILIES for case in family.cases]
    assert len(set(cases)) == len(cases)


def test_the_page_about_architectures_is_that_of_the_table() -> None:
    written = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert written == page(), "python -m tests.helpers.architecture_page > docs/architectures.md"
