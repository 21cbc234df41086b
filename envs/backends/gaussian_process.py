"""A smooth surface through noisy values at scattered settings of some knobs: Gaussian-process regression, in NumPy.

The covariance of two settings falls off with their distance (Matern 5/2: twice differentiable, not smoother), with a
length scale for each knob, so that a knob that hardly matters is hardly looked at. To it come a constant and a slope
for each knob that cost next to nothing, so that far from all settings the surface is a plane. Length scales, whether a
whole-number knob counts by its logarithm, and the noise are those with the smallest leave-one-out error, which has a
closed form (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sections 2.7, 4.2 and 5.4.2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..recordings.outcomes import RecordedKnob

Floats = NDArray[np.float64]

_LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # of a knob's range
_NOISES = (1e-5, 1e-3, 0.01, 0.03, 0.1, 0.3)  # variance, of that of the values
_STARTS = (0.4, 1.6)  # length scales from which the search sets out
_SWEEPS = 3
_PLANE = 10.0  # variance of the constant and of each slope, of that of the values
_FLAT = 1e-12  # values that differ by less, relatively, are one value


@dataclass(frozen=True)
class Scale:
    """Map from the settings of some knobs to points.

    Attributes:
        low: of each knob's range, shape (knobs,), like the rest.
        high: of each knob's range.
        logarithmic: whether the knob counts by its logarithm, its low end standing for 1.
        lengths: length scales, of a knob's range.
    """

    low: Floats
    high: Floats
    logarithmic: NDArray[np.bool_]
    lengths: Floats

    def unit(self, settings: Floats) -> Floats:
        """Settings within 0 to 1 of the ranges, same shape (..., knobs)."""
        above, span = settings - self.low, self.high - self.low
        return np.where(self.logarithmic, np.log1p(above) / np.log1p(span), above / span)

    def distances(self, ones: Floats, others: Floats) -> Floats:
        """Distances in length scales between settings, shape (ones, others)."""
        ones, others = self.unit(ones) / self.lengths, self.unit(others) / self.lengths
        squares = (ones**2).sum(1)[:, None] + (others**2).sum(1) - 2 * ones @ others.T
        result: Floats = np.sqrt(np.maximum(squares, 0.0))
        return result

    def covariance(self, ones: Floats, others: Floats) -> Floats:
        """Return the covariance of settings, shapes (ones, knobs) and (others, knobs) to (ones, others)."""
        plane = _PLANE * (1 + (self.unit(ones) - 0.5) @ (self.unit(others) - 0.5).T)
        return plane + matern(self.distances(ones, others))


def matern(distances: Floats) -> Floats:
    """Covariance by distance in length scales, from 1 at no distance to 0."""
    reach = np.sqrt(5.0) * distances
    covariance: Floats = (1 + reach + reach**2 / 3) * np.exp(-reach)
    return covariance


class Surface:
    """A surface over the settings of some knobs.

    Args:
        knobs: with the ranges.
        settings: where the values are known, shape (settings, knobs), each once.
        values: there, shape (settings,). If all are positive, their logarithms are interpolated, so that the surface is
            positive too; if none is negative, neither is the surface. Values that are all alike make a flat one.

    Attributes:
        scale: how settings become points.
        left_out: at each setting, what the surface through all the others is there, shape (settings,). It flatters
            where the settings are few, since length scales and noise were chosen with that setting among the others; it
            is too strict at the ends of the ranges, where without that setting nothing is known.
    """

    def __init__(self, knobs: Sequence[RecordedKnob], settings: Floats, values: Floats) -> None:
        self._settings = settings
        self._logarithmic = bool((values > 0).all())
        self._lowest = 0.0 if (values >= 0).all() else -np.inf
        known = np.log(values) if self._logarithmic else values
        self._mean, self._spread = float(known.mean()), float(known.std())
        flat = len(known) < 3 or self._spread <= _FLAT * max(abs(self._mean), 1.0)
        self.scale = _wide(knobs)
        if flat:
            self._weights = np.zeros(len(known))
            self.left_out = np.array(values, np.float64)
            return
        standard = (known - self._mean) / self._spread
        self.scale, noise = _best(self.scale, np.array([knob.integer for knob in knobs]), settings, standard)
        inverse = _inverse(self.scale, settings, noise)
        self._weights = inverse @ standard
        self.left_out = self._shown(standard - self._weights / np.diag(inverse))

    def __call__(self, settings: Floats) -> Floats:
        """The surface at settings of shape (places, knobs): shape (places,)."""
        if not self._weights.any():
            return self._shown(np.zeros(len(settings)))
        return self._shown(self.scale.covariance(settings, self._settings) @ self._weights)

    def _shown(self, standard: Floats) -> Floats:
        result = self._mean + self._spread * standard
        shown: Floats = np.exp(result) if self._logarithmic else np.maximum(result, self._lowest)
        return shown


def fitted(knobs: Sequence[RecordedKnob], settings: Floats, values: Floats) -> Surface:
    """A `Surface`; the same one where the same was fitted before, since every environment of a process asks for it."""
    return _known(tuple(knobs), settings.astype(np.float64).tobytes(), values.astype(np.float64).tobytes())


@functools.lru_cache(maxsize=512)
def _known(knobs: tuple[RecordedKnob, ...], settings: bytes, values: bytes) -> Surface:
    return Surface(knobs, np.frombuffer(settings).reshape(-1, len(knobs)), np.frombuffer(values))


def _wide(knobs: Sequence[RecordedKnob]) -> Scale:
    low, high = (np.array([getattr(knob, end) for knob in knobs], np.float64) for end in ("low", "high"))
    return Scale(low, high, np.zeros(len(knobs), np.bool_), np.ones(len(knobs)))


def _inverse(scale: Scale, settings: Floats, noise: float) -> Floats:
    noisy: Floats = scale.covariance(settings, settings) + noise * np.eye(len(settings))
    return np.linalg.inv(noisy).astype(np.float64, copy=False)


def _error(scale: Scale, settings: Floats, noise: float, values: Floats) -> float:
    """Mean square of what each value is off the surface through all the others."""
    inverse = _inverse(scale, settings, noise)
    return float((((inverse @ values) / np.diag(inverse)) ** 2).mean())


def _best(scale: Scale, integer: NDArray[np.bool_], settings: Floats, values: Floats) -> tuple[Scale, float]:
    """The scale and noise of the smallest leave-one-out error: one of them changed after another, from a few starts."""
    result: list[tuple[float, Scale, float]] = []
    for start in _STARTS:
        noise = 0.01
        best = Scale(scale.low, scale.high, integer, np.full(len(integer), start))
        least = _error(best, settings, noise, values)
        for _ in range(_SWEEPS):
            before = least
            for knob in range(len(integer)):
                for logarithmic in (False, True) if integer[knob] else (False,):
                    for length in _LENGTHS:
                        tried = _changed(best, knob, logarithmic, length)
                        if (error := _error(tried, settings, noise, values)) < least:
                            best, least = tried, error
            for other in _NOISES:
                if (error := _error(best, settings, other, values)) < least:
                    noise, least = other, error
            if least == before:
                break
        result.append((least, best, noise))
    return min(result, key=lambda item: item[0])[1:]


def _changed(scale: Scale, knob: int, logarithmic: bool, length: float) -> Scale:
    flags, lengths = scale.logarithmic.copy(), scale.lengths.copy()
    flags[knob], lengths[knob] = logarithmic, length
    return Scale(scale.low, scale.high, flags, lengths)
