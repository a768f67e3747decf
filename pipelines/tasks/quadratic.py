"""Quadratic equations, solved step by step after a gap: the discriminant, then both roots.

The multi-step task of Bulatov et al. 2022 (arXiv:2207.06881, section 4): an equation with integer coefficients and
roots stands first, its solution must be written at the end. The steps before a number are given, as in training with
the true text, and each of the three numbers counts. They tell much: D and x1 leave x2 as many values as there are
leading coefficients, at most nine. Chance is how often the likeliest number is right that the steps before leave.

Deviation: the solution names its steps `D`, `x1` and `x2`, the lower root first.
"""

import functools

import numpy as np

from pipelines.tasks.samples import Sample, Scene, Wanted, ask, compose

_MAX_ROOT = 99
_NUM_ROOTS = 2 * _MAX_ROOT + 1
_MAX_LEADING = 9  # coefficient of x squared


def equation(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """a (x - r) (x - s) = 0, multiplied out."""
    a = int(generator.integers(1, _MAX_LEADING + 1)) * int(generator.choice([-1, 1]))
    low, high = sorted(int(root) for root in generator.integers(-_MAX_ROOT, _MAX_ROOT + 1, size=2))
    b, c = -a * (low + high), a * low * high
    fact = scene.encode(f"\n{a}*x^2{b:+}*x{c:+}=0\n")
    gaps = _gaps(abs(a) * (high - low))
    asked = [
        ask(scene, "\nD=", str(b * b - 4 * a * c), 1 / _likeliest_discriminant()),
        ask(scene, "\nx1=", str(low), sum(_NUM_ROOTS - gap for gap in gaps) / len(gaps)),  # the lowest root
        ask(scene, "\nx2=", str(high), sum(low + gap <= _MAX_ROOT for gap in gaps)),
    ]
    return compose(scene, wanted, [fact], asked, generator, place="start")


@functools.cache
def _likeliest_discriminant() -> float:
    """How often the discriminant (a (r - s))^2 is the one that it is most often; that is 72^2, not 0."""
    root = np.arange(_MAX_LEADING * (_NUM_ROOTS - 1) + 1)  # of the discriminant
    found = np.zeros(len(root))
    for leading in range(1, _MAX_LEADING + 1):
        gap = np.arange(_NUM_ROOTS)
        ways = np.where(gap == 0, 1, 2) * (_NUM_ROOTS - gap)  # of two roots so far apart
        found[leading * gap] += ways / _NUM_ROOTS**2 / _MAX_LEADING
    return float(found.max())


def _gaps(root: int) -> set[int]:
    """How far apart the roots can be, by the square root of the discriminant."""
    gaps = {root // leading for leading in range(1, _MAX_LEADING + 1) if root % leading == 0}
    return {gap for gap in gaps if gap < _NUM_ROOTS}
