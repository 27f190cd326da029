"""Accuracy with honest intervals."""

import math

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile


def wilson_interval(correct, count, z=Z95):
    """The Wilson score interval (1927) of a proportion: (low, high) in [0, 1], sound near 0 and 1 and for few images.

    Args:
        correct: number of successes in `count` independent trials, count > 0.
    """
    p = correct / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def paired_difference(a, b, z=Z95):
    """How much more often `a` is right than `b` on the same trials, with its 95% interval: (difference, low, high).

    The interval is that of Agresti and Min (2005) for matched pairs: Wald's after adding half a trial to each of the
    four outcomes, which keeps its coverage where the two seldom differ.

    Args:
        a, b: 1 or 0 for right or wrong, of each trial in the same order.
    """
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n, p, q = len(a) + 2, only_a + 0.5, only_b + 0.5
    middle = (p - q) / n
    half = z * math.sqrt((p + q) / n - middle**2) / math.sqrt(n)
    return (only_a - only_b) / len(a), middle - half, middle + half
