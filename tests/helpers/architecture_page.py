"""The page of docs about architectures, from the table of those that are tested.

``python -m tests.helpers.architecture_page > docs/architectures.md`` writes it anew.
"""

from __future__ import annotations

from tests.helpers.architecture_chains import FAMILIES
from tests.helpers.architectures import BEHIND_WINDOWS, CONTEXT, UNCHANGING, WINDOW, Family

INTRODUCTION = """# Architectures

Any causal LM of transformers can be handed over. When a pair is made, the model is tried: a copy of its configuration
is shrunk until its windows, chunks and switches are a few tokens long, and a small random model of it reads texts
through all of them as decoders do. So an architecture that is not in these tables is decoded if it gives what
`generate()` gives, and refused with the reason if it does not.

`pair.target.branches` is False where trees of candidates cannot be verified; `why_no_branches` says why, and
`context_limit` how long a text may be. Speculative decoding, thresholds and Jacobi decoding read chains; Lookahead,
Medusa and draft trees read trees.

The tables are those of `tests/decoding/models/test_architectures.py`. {count} configurations of {kinds} model types,
{trees} of them with trees, are decoded greedily by autoregressive and speculative decoding, and by draft trees where
they can be verified; one of every kind, those with eager attention and those with long prompts also by Lookahead, or
by Jacobi decoding, and with a draft of the same architecture. The context is of {context} tokens and windows are of
{window}. Texts run to the context's end where positions are learned, long prompts are read or the rotation switches;
to {windows} tokens through windows, and to {shortest} where nothing changes behind. The draft is often wrong. Every
text equals that of `generate()`, token for token. This page is written by
`python -m tests.helpers.architecture_page`.
"""
DECODED = """## What is decoded

Chains of candidates are verified for all of these, trees for some.

| architectures | model types | configurations | trees | notes |
|---|---|---|---|---|
"""
REFUSED = """## What is refused

| architectures | model types | why, and what to do |
|---|---|---|
"""
OTHERS = """Refused as well, whatever the architecture: modules that `torch.compile` has wrapped, adapters of PEFT that
are not merged, targets in dynamic int8 or LLM.int8 (drafts may be), models without weights, and prompts longer than
`context_limit`. Each message names the way out.

Models with an encoder (T5, BART, Marian, Pegasus) have a [page of their own](encoder-decoder.md).
"""


def kinds(family: Family) -> str:
    """Model types of a family, each named once."""
    return ", ".join(f"`{kind}`" for kind in sorted({case.kind for case in family.cases}))


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def page() -> str:
    """Text of the page."""
    decoded = [family for family in FAMILIES if family.chains]
    introduction = INTRODUCTION.format(
        count=sum(len(family.cases) for family in decoded),
        kinds=len({case.kind for family in decoded for case in family.cases}),
        trees=sum(len(family.cases) for family in decoded if family.trees),
        context=CONTEXT,
        window=WINDOW,
        windows=BEHIND_WINDOWS,
        shortest=UNCHANGING,
    )
    rows = [
        f"| {family.name} | {kinds(family)} | {len(family.cases)} | {_yes(family.trees)} | {family.note} |\n"
        for family in decoded
    ]
    refusals = [f"| {family.name} | {kinds(family)} | {family.note} |\n" for family in FAMILIES if not family.chains]
    return "".join([introduction, "\n", DECODED, *rows, "\n", REFUSED, *refusals, "\n", OTHERS])


if __name__ == "__main__":
    print(page(), end="")
