"""Fractions of cases, with confidence intervals."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """`hits` out of `count` cases; the fraction should be at least `bound`."""

    name: str
    hits: int
    count: int
    bound: float | None = None

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval (Wilson 1927)."""
        z, n, p = 1.96, max(self.count, 1), self.value
        middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((middle + side * reach) / (1 + z * z / n) for side in (-1, 1))
        return max(low, 0.0), min(high, 1.0)  # rounding may exceed [0,1]

    @property
    def ok(self) -> bool:
        return self.bound is None or self.value >= self.bound  # NaN is not ok


def print_share(share: Share) -> None:
    """Print one line."""
    low, high = share.interval
    bound = "" if share.bound is None else f"{share.bound:.0%} {'ok' if share.ok else 'OUT'}"
    print(f"{share.name:<52} {share.value:>6.1%}  {f'{low:.1%} to {high:.1%}':<16} {share.count:>5}  {bound}")
