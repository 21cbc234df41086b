"""Errors of this package, each naming what is wrong and the way out; checks of arguments that raise them; their ends
as one line of a command.

The checks take one number of Python, NumPy or torch, and return it as a plain Python number: settings end up in JSON
files, in keys of caches and in messages.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:  # which imports this module
    from .rounds import Generation

_T = TypeVar("_T")

LARGEST_WHOLE: Final = 2**63 - 1
"""Largest number that torch and NumPy count with."""
TORCH_SEEDS: Final = (-(2**63), 2**64 - 1)
"""Smallest and largest seed of `torch.Generator.manual_seed`, by its documentation (torch 2.13)."""
MOST_THREADS: Final = 1024
"""Threads of torch at most. OpenMP ends the process when it cannot start them all (torch 2.13 on Linux)."""
LARGEST_SEED: Final = 2**32 - 1
"""Largest seed of `numpy.random.seed` and `numpy.random.RandomState` (numpy/random/mtrand.pyx and _mt19937.pyx of NumPy
2.3), which Stable-Baselines3 passes every seed to (common/utils.py, `set_random_seed`)."""


class SpecgymError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code: int = 2


class ArgumentError(SpecgymError, ValueError):
    """An argument of the wrong kind or out of its range; the message names it, its value, and what is allowed."""


class UnsupportedModelError(SpecgymError, TypeError):
    """A model that cannot be decoded speculatively, for instance one without a croppable key/value cache."""


class VocabularyMismatchError(SpecgymError, ValueError):
    """A draft whose tokens cannot be told in terms of its target's; the message says what is missing."""


class PromptError(SpecgymError, ValueError):
    """A prompt that is empty, too long for the model, or holds ids outside the vocabulary."""


class KnobError(SpecgymError, ValueError):
    """A knob that the decoder does not have, or a value outside its range."""


class NumericalError(SpecgymError, ArithmeticError):
    """A model that produced NaN where probabilities were needed."""


class BatchError(SpecgymError, RuntimeError):
    """Some texts of a batch ended with an error; the others were finished, and are here.

    Args:
        generations: of all texts, in their order; None in the place of one that has failed.
        errors: what kept texts from their end, by their number.

    Attributes:
        generations: as given.
        errors: likewise.
    """

    def __init__(self, generations: Sequence[Generation | None], errors: Mapping[int, Exception]) -> None:
        self.generations, self.errors = list(generations), dict(errors)
        first, error = min(self.errors.items())
        super().__init__(
            f"{len(errors)} of {len(generations)} texts ended with an error, the first of them text {first} (counted "
            f"from 0): {type(error).__name__}: {error}. The others are in `generations` of this BatchError."
        )


class FitError(SpecgymError, ValueError):
    """A setting of a fit command, its text or its target does not fit; the message says which and the way out."""


class TrainingError(SpecgymError, RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers and service managers end a process; treated like an interruption by the user."""


def interruption_code(interruption: KeyboardInterrupt) -> int:
    """Exit code after an interruption, 128 and the signal's number as shells have it: 130, or 143 for SIGTERM."""
    return 128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT)


def run_command(run: Callable[[], object], way_on: str = "") -> int:
    """Run a command of this package; what its user can mend, or has done, becomes one line on stderr.

    Args:
        run: the command.
        way_on: what to do after an interruption, a sentence.

    Returns:
        The exit code: 0; 2 for what the user can mend, such as a full disk; 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _terminable():
            run()
            sys.stdout.flush()  # the last words may not fit on a full disk either
    except KeyboardInterrupt as interruption:
        code = interruption_code(interruption)
        message = " ".join(["terminated." if isinstance(interruption, Terminated) else "interrupted.", way_on]).strip()
    except SpecgymError as error:
        code, message = error.exit_code, f"error: {error}"
    except MemoryError as error:
        code, message = 2, f"error: not enough memory ({_got(error)}); ask for less, or use a larger machine"
    except OSError as error:
        code, message = 2, f"error: {io_message(error)}"
    else:
        return 0
    print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its exit, and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def io_message(error: OSError) -> str:
    """Words of an operating system's error on one line, with the file first if it is known."""
    reason = error.strerror or str(error) or type(error).__name__
    places = [str(path) for path in (error.filename, error.filename2) if path is not None]
    return f"{' -> '.join(places)}: {reason}" if places else reason


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` here, once; where another thread runs this, nothing is changed."""

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being saved now should be saved
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def number(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    hint: str = "",
    error: type[Exception] = ArgumentError,
) -> float:
    """Check that an argument is one finite number within its range.

    Args:
        name: of the argument, for the message.
        value: a number of Python, NumPy or torch; arrays and tensors only of shape (). A bool is no number.
        at_least: smallest value allowed.
        above: number that the value must exceed.
        at_most: largest value allowed.
        below: number that the value must not reach.
        hint: what else to say in the message, such as a way out.
        error: class of the error.

    Returns:
        The value as a Python number; an int stays an int.

    Raises:
        ArgumentError: the value is no number, not finite or out of range; or `error`.
    """
    plain = _plain(value)
    if plain is None or not (at_least <= plain <= at_most and above < plain < below):
        allowed = _range("number", at_least, above, at_most, below)
        raise error(f"{name} must be {allowed}, got {_got(value)}{_also(hint)}")
    return plain


def whole_number(
    name: str,
    value: object,
    *,
    at_least: int = 1,
    at_most: int = LARGEST_WHOLE,
    hint: str = "",
    error: type[Exception] = ArgumentError,
) -> int:
    """Check that an argument is one whole number within its range; 3.0 counts as 3.

    Args:
        name: of the argument, for the message.
        value: as for `number`.
        at_least: smallest value allowed.
        at_most: largest value allowed.
        hint: what else to say in the message, such as a way out.
        error: class of the error.

    Returns:
        The value as an int.

    Raises:
        ArgumentError: the value is no whole number or out of range; or `error`.
    """
    plain = _plain(value)
    if plain is None or int(plain) != plain or not at_least <= plain <= at_most:
        # The largest number that can be counted with is worth a word only to somebody who is beyond it.
        beyond = at_most < LARGEST_WHOLE or (plain is not None and plain > at_most)
        allowed = _range("whole number", at_least, -math.inf, at_most if beyond else math.inf, math.inf)
        raise error(f"{name} must be {allowed}, got {_got(value)}{_also(hint)}")
    return int(plain)


def seed_number(name: str, value: object, error: type[Exception] = ArgumentError) -> int:
    """Check that an argument is a seed that every random generator takes, 0 to `LARGEST_SEED`.

    Raises:
        ArgumentError: it is none; or `error`.
    """
    return whole_number(name, value, at_least=0, at_most=LARGEST_SEED, error=error)


def one_of(name: str, value: object, choices: Sequence[_T], error: type[Exception] = ArgumentError) -> _T:
    """Check that an argument is one of its choices, and return that choice.

    Raises:
        ArgumentError: it is none of them; or `error`.
    """
    for choice in choices:
        # Arrays compare by element, and True equals 1.
        if value is choice or (isinstance(value, type(choice)) and not isinstance(value, bool) and value == choice):
            return choice
    raise error(f"{name} must be one of {', '.join(map(repr, choices))}, got {_got(value)}")


def text(name: str, value: object, error: type[Exception] = ArgumentError) -> str:
    """Check that an argument is a string with at least one character.

    Raises:
        ArgumentError: it is none; or `error`.
    """
    if not isinstance(value, str) or not value:
        raise error(f"{name} must be a string, and not an empty one; got {_got(value)}")
    return str(value)


def sequence_of(
    name: str,
    values: object,
    check: Callable[[str, object], _T],
    *,
    fewest: int = 1,
    distinct: bool = False,
    error: type[Exception] = ArgumentError,
) -> tuple[_T, ...]:
    """Check that an argument has several values, each of which passes a check.

    Args:
        name: of the argument, for the message.
        values: any iterable but a string or a mapping.
        check: takes a name for the message and a value, and returns the value.
        fewest: number of values below which there are too few.
        distinct: refuse a value that comes twice.
        error: class of the error.

    Raises:
        ArgumentError: it is no sequence, too short, or has a value twice; or `error`, or what `check` raises.
    """
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping) and _shape(values) != ()
    if not several:
        raise error(f"{name} must be a sequence of values, got {_got(values)}")
    checked = tuple(check(f"each of {name}", value) for value in values)  # type: ignore[attr-defined]
    if len(checked) < fewest:
        raise error(f"{name} must have at least {fewest} value{'s' if fewest > 1 else ''}, got {len(checked)}")
    repeated = [value for place, value in enumerate(checked) if value in checked[:place]] if distinct else []
    if repeated:
        raise error(f"{name} has {repeated[0]!r} twice; give each once")
    return checked


def mapping_of(name: str, value: object, error: type[Exception] = ArgumentError) -> Mapping[Any, Any]:
    """Check that an argument is a mapping, such as a dict; None counts as an empty one.

    Raises:
        ArgumentError: it is none; or `error`.
    """
    if value is not None and not isinstance(value, Mapping):
        raise error(f"{name} must be a mapping of names to values, got {_got(value)}")
    return value or {}


def check_fields(instance: object, check: Callable[[str, object], Any], *names: str) -> None:
    """Pass fields of a dataclass, frozen or not, through a check, and keep what it returns.

    Args:
        instance: the dataclass, within its `__post_init__`.
        check: takes the name of a field and its value, and returns the value to keep.
        names: of the fields.
    """
    for name in names:
        object.__setattr__(instance, name, check(name, getattr(instance, name)))


def _plain(value: Any) -> float | None:
    """The finite Python number that a value is; None if it is none."""
    if type(value) not in (int, float) and _shape(value) == ():  # of NumPy or torch
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        plain = int(value) if isinstance(value, Integral) else float(value)
        return plain if math.isfinite(plain) else None
    except OverflowError:  # whole numbers have no bound, floating-point numbers do
        return None


def _shape(value: Any) -> object:
    """Shape of an array or tensor, a tuple; None for everything else."""
    return getattr(value, "shape", None) if callable(getattr(value, "item", None)) else None


def _range(kind: str, at_least: float, above: float, at_most: float, below: float) -> str:
    if math.isfinite(at_least) and math.isfinite(at_most):
        return f"a {kind} from {_limit(at_least)} to {_limit(at_most)}"
    ends = [
        f"{word} {_limit(limit)}"
        for word, limit in (("of at least", at_least), ("above", above), ("at most", at_most), ("below", below))
        if math.isfinite(limit)
    ]
    finite = "finite " if kind == "number" and len(ends) < 2 else ""
    return " ".join([f"a {finite}{kind}", " and ".join(ends)]).strip()


def _limit(value: float) -> str:
    return str(value) if isinstance(value, int) else format(value, "g")


def _got(value: Any) -> str:
    """A value in a message: short, on one line, whatever it is."""
    shape = _shape(value)
    if shape is not None and shape != ():
        return f"{type(value).__name__} of shape {tuple(shape)}"  # type: ignore[arg-type]
    try:
        shown = repr(value.item() if shape == () else value)
    except Exception:  # for instance a whole number of more digits than Python prints
        return f"a value of type {type(value).__name__}"
    shown = " ".join(shown.split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _also(hint: str) -> str:
    return f"; {hint}" if hint else ""
