"""What a few repetitions say: paired differences, corrected for how many are looked at, and their power.

The unit is a training: sampling seeds are averaged inside it, and the arms' trainings of one seed, drawn and
judged with the same random numbers, make a pair.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
      mean: of the differences.
      sd: their unbiased standard deviation; None for one pair.
      n: pairs.
      margin: half width of the 95 % interval of the mean (Student's t); None for one pair.
      p: of the two-sided t-test against 0; None for one pair, or where all differences are equal.
    """

    mean: float
    sd: float | None
    n: int
    margin: float | None
    p: float | None

    @property
    def detectable(self) -> float | None:
        """The least true difference that n pairs of this spread tell from 0 in four of five trials."""
        return None if self.sd is None else detectable(self.sd, self.n)


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
    error = sd / math.sqrt(n)
    margin = float(stdtrit(n - 1, 1.0 - LEVEL / 2.0)) * error
    p = float(2.0 * stdtr(n - 1, -abs(mean) / error)) if error else None
    return Difference(mean, sd, n, margin, p)


def detectable(sd: float, n: int) -> float:
    """The difference that a two-sided t-test at 5 % finds with probability 0.8, by the usual approximation.

    (t_{0.975} + t_{0.8}) sd / sqrt(n), with n - 1 degrees of freedom; infinite for n = 1.
    """
    if n < 2:
        return math.inf
    quantiles = stdtrit(n - 1, 1.0 - LEVEL / 2.0) + stdtrit(n - 1, POWER)
    return float(quantiles) * sd / math.sqrt(n)


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
