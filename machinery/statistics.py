"""The textbook statistics of eval_gaia.py: an interval for a share, pass@k, and two ways to compare paired results."""
import math
import random
from statistics import fmean


def wilson(right: float, n: int) -> tuple[float, float]:
    """The Wilson score interval (95 %) of a share."""
    if n == 0:
        return 0.0, 1.0
    p, z = right / n, 1.96
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, if `right` of n are (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value, of the questions that only one evaluation got right."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n)


def paired_bootstrap(differences: list[float], rounds: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, from questions chosen with replacement."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(differences, k=len(differences))) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]
