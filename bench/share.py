"""Shares of cases, with the interval that so many cases leave open."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """`hits` of `count` cases, which should be at least `bound` of them."""

    name: str
    hits: int
    count: int
    bound: float | None = None

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 % confidence (Wilson 1927)."""
        z, n, p = 1.96, max(self.count, 1), self.value
        middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((middle + side * reach) / (1 + z * z / n) for side in (-1, 1))
        return max(low, 0.0), min(high, 1.0)  # rounding reaches beyond both ends

    @property
    def ok(self) -> bool:
        return self.bound is None or self.value >= self.bound  # NaN is not


def print_share(share: Share) -> None:
    """One line."""
    low, high = share.interval
    bound = "" if share.bound is None else f"{share.bound:.0%} {'ok' if share.ok else 'OUT'}"
    print(f"{share.name:<52} {share.value:>6.1%}  {f'{low:.1%} to {high:.1%}':<16} {share.count:>5}  {bound}")
