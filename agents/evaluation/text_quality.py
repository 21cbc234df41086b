"""Likeness of texts to references: BLEU of translations by sacrebleu, ROUGE of summaries by rouge-score.

Both are sums over texts (BLEU of n-grams that match, ROUGE of F1 scores), so that a bootstrap draws prompts and adds up
again. Methods are drawn alike, and the change from plain decoding's texts is paired.

BLEU: Papineni et al., 2002; its signature says how: Post, 2018 (arXiv 1804.08771). ROUGE: Lin, 2004. Paired bootstrap:
Koehn, 2004.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from specgym.decoding import MEASURES, ArgumentError, Generation, Measure, SpecgymError, one_of
from specgym.envs import Workload, workload

from .results import Column, Row, resampled, with_intervals
from .statistics import Floats

SHOWN: Final[Mapping[Measure, str]] = {"bleu": "bleu", "rouge": "rougeL"}
"""Scores that tables show, by measure."""
CHANGE: Final = "_change"
"""End of the name of a score's change from plain decoding."""
_ROUGE: Final = ("rouge1", "rouge2", "rougeL")
_SCORES: Final[Mapping[Measure, tuple[str, ...]]] = {"bleu": ("bleu",), "rouge": _ROUGE}
QUALITY_COLUMNS: Final = tuple(
    itertools.chain.from_iterable((*_SCORES[measure], SHOWN[measure] + CHANGE) for measure in MEASURES)
)
"""Columns of a table's rows whose texts have references."""
_NAMES: Final[Mapping[Measure, str]] = {"bleu": "BLEU", "rouge": "ROUGE-L"}
_LIBRARIES: Final[Mapping[Measure, str]] = {"bleu": "sacrebleu", "rouge": "rouge-score"}
_ORDERS: Final = 4
_EXPLANATION: Final = (
    " {}, 0 to 100, compares texts with the prompts' references; the change is from plain decoding's texts of the same "
    "prompts, with half the 95 % interval of a paired bootstrap over them."
)


class TextQualityError(SpecgymError, RuntimeError):
    """The library that compares texts with references is missing; the message says how to install it."""


@dataclass(frozen=True)
class TextQuality:
    """Likeness of some texts to their references.

    Attributes:
        measure: that was asked for.
        scores: 0 to 100, by name: ``bleu``; or ``rouge1``, ``rouge2`` and ``rougeL``, means of F1.
        intervals: (low, high) of each, 95 % of a bootstrap over the texts; empty for a single text.
        signature: how the library has counted, with its version.
        texts: how many.
        change: of BLEU or ROUGE-L from that of the texts that these were to be compared with; 0 where there were none.
        change_interval: its (low, high), 95 % of a bootstrap that draws the texts of both sides together.
    """

    measure: Measure
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    signature: str
    texts: int
    change: float = 0.0
    change_interval: tuple[float, float] = (0.0, 0.0)

    @property
    def score(self) -> float:
        """BLEU or ROUGE-L, 0 to 100."""
        return self.scores[SHOWN[self.measure]]

    def __str__(self) -> str:
        score, number = SHOWN[self.measure], f"{self.texts} text{'s' if self.texts != 1 else ''}"
        ends = "{:.1f} to {:.1f}, ".format(*self.intervals[score]) if score in self.intervals else ""
        return f"{_NAMES[self.measure]} {self.score:.1f} ({ends}{number}, {self.signature})"


def text_quality(
    texts: Sequence[str],
    references: Sequence[str | Sequence[str]],
    measure: Measure = "bleu",
    *,
    against: Sequence[str] | None = None,
) -> TextQuality:
    """Compare texts with what they should be.

    Args:
        texts: translations or summaries, at least one.
        references: of each text, a string or several.
        measure: ``"bleu"``, of all texts together, by sacrebleu with its defaults (for languages that are written with
            spaces); ``"rouge"``, means over the texts by rouge-score with Porter's stemmer (for English: it drops
            letters other than a to z).
        against: other texts for the same references, such as those of plain decoding.

    Raises:
        TextQualityError: the library is missing.
        ArgumentError: there is no text, not a reference for each, or one is no string; or there is no such measure.
    """
    one_of("measure", measure, MEASURES)
    _library(measure)
    several = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in references]
    sides = {"texts": texts} if against is None else {"texts": texts, "against": against}
    for name, entries in sides.items():
        if isinstance(entries, str) or not entries or len(entries) != len(several):
            raise ArgumentError(f"{name}: {len(entries)} texts for {len(several)} references; give one for each")
        for place, (text, of_text) in enumerate(zip(entries, several, strict=True)):
            if not of_text or not all(isinstance(part, str) for part in (text, *of_text)):
                raise ArgumentError(f"{name}[{place}] is {text!r} with references {of_text!r}; give strings")
    ways = resampled(len(texts))
    sums = [statistics_of([[text] for text in entries], several, measure)[ways].sum(1) for entries in sides.values()]
    mine, other = sums[0], sums[-1]
    scores, intervals = with_intervals(quality_columns(mine, other, measure))
    change = scores.pop(SHOWN[measure] + CHANGE)
    change_interval = intervals.pop(SHOWN[measure] + CHANGE, (change, change))
    signature = _signature(texts, several, measure)
    return TextQuality(measure, scores, intervals, signature, len(texts), change, change_interval)


def require_measure(measure: Measure, reason: str = "") -> None:
    """Raise TextQualityError if the library of a measure is missing: before anything is decoded.

    Args:
        measure: to be taken later.
        reason: beginning of the message.
    """
    _library(measure, reason)


def require_text_quality(workloads: Iterable[str | Workload]) -> None:
    """Raise TextQualityError if a workload has references, and the library of its measure is missing."""
    for named in workloads:
        prompts = workload(named).prompt_set()
        if prompts is not None and prompts.test_references:
            require_measure(prompts.measure, f"the prompts of {named} have references: ")


def texts_of(generations: Sequence[Generation]) -> list[str]:
    """Texts of some generations, whose pair has a tokenizer."""
    return [generation.text or "" for generation in generations]


def statistics_of(texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]], measure: Measure) -> Floats:
    """Sums that scores are made from, shape (prompts, statistics).

    Args:
        texts: one or several for each prompt.
        references: of each prompt.
        measure: of the scores.
    """
    library = _library(measure)
    scorer = library.BLEU(effective_order=True) if measure == "bleu" else library.RougeScorer(_ROUGE, use_stemmer=True)

    def of_text(text: str, of_prompt: Sequence[str]) -> list[float]:
        if measure == "bleu":
            score = scorer.sentence_score(text, list(of_prompt))
            return [score.sys_len, score.ref_len, *score.counts, *score.totals]
        return [1.0, *(value.fmeasure for value in scorer.score_multi(list(of_prompt), text).values())]

    return np.array(
        [
            np.sum([of_text(text, of_prompt) for text in of_one], axis=0)
            for of_one, of_prompt in zip(texts, references, strict=True)
        ]
    )


def quality_columns(sums: Floats, plain: Floats, measure: Measure) -> dict[str, Floats]:
    """Scores by name, and the change of the one that is shown from plain decoding's, each of shape (resamples,).

    Args:
        sums: of `statistics_of` over prompts, shape (resamples, statistics).
        plain: those of plain decoding, of the same prompts.
        measure: of the scores.
    """
    columns, before = _scores(sums, measure), _scores(plain, measure)
    shown = SHOWN[measure]
    return {**columns, shown + CHANGE: columns[shown] - before[shown]}


def _scores(sums: Floats, measure: Measure) -> dict[str, Floats]:
    if measure == "rouge":
        return {name: 100 * sums[:, place] / sums[:, 0] for place, name in enumerate(_ROUGE, 1)}
    bleu = _library(measure).BLEU
    scores = [
        bleu.compute_bleu(row[2 : 2 + _ORDERS], row[2 + _ORDERS :], row[0], row[1], smooth_method="exp").score
        for row in sums.astype(int).tolist()
    ]
    return {"bleu": np.array(scores, np.float64)}


def described(
    generations: Sequence[Sequence[Generation]], references: Sequence[Sequence[str]], measure: Measure
) -> str:
    """Number and length of plain decoding's texts that are scored, and the library's signature, in words.

    Args:
        generations: of each prompt, one or several.
        references: of each prompt.
        measure: of the scores.
    """
    decoded = [generation for same in generations for generation in same]
    cut = [len(generation.tokens) for generation in decoded if generation.finish_reason == "length"]
    short = f" ({len(cut)} of plain decoding's end after {max(cut)} tokens, unfinished)" if cut else ""
    repeated = [of_prompt for same, of_prompt in zip(generations, references, strict=True) for _ in same]
    signature = _signature(texts_of(decoded), repeated, measure)
    return f"{_NAMES[measure]} is that of {len(decoded)} text{'s' if len(decoded) != 1 else ''}{short}: {signature}."


def scored_texts(rows: Sequence[Row]) -> list[str]:
    """Sentences on the texts that were scored, each once."""
    return list(dict.fromkeys(row.scored for row in rows if row.scored))


def changes_told(values: Mapping[str, float]) -> str:
    """Change of a row's score from plain decoding's, to be put after other figures; empty where none was scored."""
    changes = {_NAMES[measure]: values.get(score + CHANGE) for measure, score in SHOWN.items()}
    return "".join(f", {name} {change:+.1f}" for name, change in changes.items() if change is not None)


def quality_view(rows: Sequence[Row]) -> tuple[tuple[Column, ...], str]:
    """Columns of a table for the texts that have references, and their explanation; or nothing."""
    columns, names = [], []
    for measure, score in SHOWN.items():
        if any(score in row.values for row in rows):
            name = _NAMES[measure]
            columns += [Column(score, name, ".1f"), Column(score + CHANGE, "change", "+.1f", interval=True)]
            names.append(name)
    return tuple(columns), _EXPLANATION.format(" or ".join(names)) if names else ""


def _signature(texts: Sequence[str], references: Sequence[Sequence[str]], measure: Measure) -> str:
    library = _library(measure)
    if measure == "rouge":
        return f"rouge-score {'+'.join(_ROUGE)}|stem:porter|version:{importlib.metadata.version('rouge-score')}"
    metric = library.BLEU()
    # Streams of references, with None where a text has fewer: what the number of references is counted by.
    metric.corpus_score(list(texts), [list(stream) for stream in itertools.zip_longest(*references)])
    return f"sacrebleu {metric.get_signature()}"


def _library(measure: Measure, reason: str = "") -> Any:
    try:
        if measure == "bleu":
            import sacrebleu

            return sacrebleu
        from rouge_score import rouge_scorer

        return rouge_scorer
    except ImportError as error:
        raise TextQualityError(
            f'{reason}{_NAMES[measure]} needs the library "{_LIBRARIES[measure]}": pip install "specgym[quality]"'
        ) from error
