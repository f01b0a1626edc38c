"""The textbook statistics of eval_gaia.py: an interval for a share, pass@k, and two ways to compare paired results."""
import math
import random
from statistics import fmean


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval (95 %) of a share."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, z * z
    centre = p + z2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, if `right` of n are (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value, of the questions that only one evaluation got right."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n
    return min(1.0, 2 * tail)


def paired_bootstrap(differences: list[float], rounds: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, from questions chosen with replacement."""
    rng, n = random.Random(seed), len(differences)
    means = sorted(fmean(rng.choices(differences, k=n)) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]
