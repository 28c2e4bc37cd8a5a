"""What a few repetitions say: paired differences, corrected for how many are looked at, and their power.

The unit is a training: sampling seeds are averaged inside it, and the arms' trainings of one seed, drawn and
judged with the same random numbers, make a pair.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

LEVEL = 0.05
POWER = 0.8
_ROUNDING = 1e-12  # of the numbers themselves, which differences that are equal may differ by


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
      mean: of the differences.
      sd: their unbiased standard deviation; None for one pair, 0 where they are equal but for rounding.
      n: pairs.
      margin: half width of the 95 % interval of the mean (Student's t); None for one pair.
      p: of the two-sided t-test against 0; None for one pair, or where all differences are equal.
    """

    mean: float
    sd: float | None
    n: int
    margin: float | None
    p: float | None


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a - b, pair by pair.

    Raises:
      ValueError: the two are not of one length, or empty.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} numbers make no pairs")
    differences = np.subtract(a, b, dtype=np.float64)
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return Difference(mean, None, 1, None, None)
    sd = float(differences.std(ddof=1))
    if sd <= _ROUNDING * max(np.abs(a).max(), np.abs(b).max()):
        sd = 0.0
    error = sd / math.sqrt(n)
    margin = float(stdtrit(n - 1, 1.0 - LEVEL / 2.0)) * error
    p = float(2.0 * stdtr(n - 1, -abs(mean) / error)) if error else None
    return Difference(mean, sd, n, margin, p)


def detectable(sd: float, n: int, level: float = LEVEL) -> float:
    """The difference that a two-sided t-test at a level finds with probability 0.8.

    By Student's noncentral t with n - 1 degrees of freedom; infinite for n = 1.
    """
    if n < 2:
        return math.inf
    least = stdtrit(n - 1, 1.0 - level / 2.0)
    return float(nctdtrinc(n - 1, 1.0 - POWER, least)) * sd / math.sqrt(n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: p-values of which those under 5 % hold together at 5 %.

    The k-th smallest of m is multiplied by m - k (k from 0); none is smaller than the one before it, and
    none exceeds 1.
    """
    corrected, least = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = least
    return {name: corrected[name] for name in p_values}
