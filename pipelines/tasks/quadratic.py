"""Quadratic equations, solved step by step after a gap: the discriminant, then both roots.

The multi-step task of Bulatov et al. 2022 (arXiv:2207.06881, section 4): an equation with integer coefficients and
roots stands first, its solution must be written at the end. The steps before a number are given, as in training with
the true text, and each of the three numbers counts. They tell much: D and x1 leave x2 as many values as there are
leading coefficients, at most nine, and chance is by what is left.

Deviation: the solution names its steps `D`, `x1` and `x2`, the lower root first.
"""

import numpy as np

from pipelines.tasks.samples import Sample, Scene, Wanted, ask, compose

_MAX_ROOT = 99
_MAX_LEADING = 9  # coefficient of x squared


def equation(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """a (x - r) (x - s) = 0, multiplied out."""
    a = int(generator.integers(1, _MAX_LEADING + 1)) * int(generator.choice([-1, 1]))
    low, high = sorted(int(root) for root in generator.integers(-_MAX_ROOT, _MAX_ROOT + 1, size=2))
    b, c = -a * (low + high), a * low * high
    fact = scene.encode(f"\n{a}*x^2{b:+}*x{c:+}=0\n")
    num_roots = 2 * _MAX_ROOT + 1
    gaps = _gaps(abs(a) * (high - low))
    asked = [
        ask(scene, "\nD=", str(b * b - 4 * a * c), num_roots),  # (a (r - s))^2; 0 is the likeliest, of equal roots
        ask(scene, "\nx1=", str(low), num_roots - min(gaps)),
        ask(scene, "\nx2=", str(high), sum(low + gap <= _MAX_ROOT for gap in gaps)),
    ]
    return compose(scene, wanted, [fact], asked, generator, place="start")


def _gaps(root: int) -> set[int]:
    """How far apart the roots can be, by the square root of the discriminant."""
    gaps = {root // leading for leading in range(1, _MAX_LEADING + 1) if root % leading == 0}
    return {gap for gap in gaps if gap <= 2 * _MAX_ROOT}
