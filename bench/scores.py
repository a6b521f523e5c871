"""What the pictures of `bench league` add up to: scores with bootstrap intervals, tables, and the order of methods."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from .plot import front
from .scenes import SPLITS

Row: TypeAlias = dict[str, Any]
Values: TypeAlias = Callable[[Row], Sequence[float]]
IN_BOX = 0.5  # minimum IoU
COUNTED = tuple(split for split in SPLITS if split[0].isdigit())
PUBLISHED = {
    "none": 10.1,
    "attend_and_excite": 14.2,
    "dense_diffusion": 17.6,
    "boxdiff": 16.5,
    "layout": 22.1,
    "refocusing + SAR": 24.6,
    "rnb": 29.6,
}
"""The spatial column of LoCo (Zhao et al. 2023, table 1), measured on Stable Diffusion, HRS and DrawBench."""
WITHOUT_SAR = {"refocusing": 24.6}  # stands in where the self-attention half is missing

SCORES: dict[str, Values] = {
    "area": lambda row: row.get("ious", ()),
    "in box": lambda row: [value >= IN_BOX for value in row.get("ious", ())],
    "count": lambda row: [row["count"] == 0],
    "swaps": lambda row: [one == "swap" for one in row.get("landed", ())],
    "leaks": lambda row: [one in ("colour", "shape") for one in row.get("landed", ())],
    "facts": lambda row: [row["facts"]],
    "drift": lambda row: [] if row["drift"] is None else [row["drift"]],  # None for a picture of another noise
    "passes": lambda row: [row["used"]],
    "seconds": lambda row: [row["seconds"]],
}
"""Name -> a picture's numbers, of which the score is the mean. area: under the curve of objects whose IoU is at least
a cut between 0 and 1, which is their mean IoU (0 for an object that is not there)."""
BY_SPLIT: Mapping[str, tuple[str, Values]] = {
    "relations": ("true", lambda row: [row["true"]]),
    "strokes": ("distance", lambda row: [row["distance"]]),
}
"""What is scored instead of "in box"."""


def mean(rows: Sequence[Row], values: Values) -> float:
    """NaN without any."""
    found = [float(value) for row in rows for value in values(row)]
    return statistics.fmean(found) if found else math.nan


def bootstrap(rows: Sequence[Row], values: Values, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `mean` when prompts are drawn with replacement, each with the pictures of all its seeds."""
    groups: dict[object, list[float]] = {}
    for row in rows:
        groups.setdefault((row["split"], row["number"]), []).extend(map(float, values(row)))
    sums = np.array([[sum(own), len(own)] for own in groups.values() if own])
    if not len(sums):
        return math.nan, math.nan
    picked = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    total = sums[picked].sum(axis=1)
    low, high = np.quantile(total[:, 0] / total[:, 1], [0.025, 0.975])
    return float(low), float(high)


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """tau-b (Kendall 1945)."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    untied = math.prod(sum(pair[k] != 0 for pair in signs) for k in (0, 1))
    return float(sum(x * y for x, y in signs) / math.sqrt(untied)) if untied else math.nan


def agreement(rows: Sequence[Row], draws: int = 1000, seed: int = 0) -> tuple[list[str], float, tuple[float, float]]:
    """The methods shared with LoCo's table, tau of their own settings' shares in the box with it, its interval.

    Every method has the same prompts, so a draw takes the same ones of all.
    """
    own = [row for row in rows if row["passes"] is None and row["split"] in COUNTED]
    there = {row["method"] for row in own}
    published = {name: value for name, value in (PUBLISHED | WITHOUT_SAR).items() if name in there}
    if "refocusing + SAR" in published:
        published.pop("refocusing", None)
    names = list(published)
    each = [{(row["split"], row["number"]) for row in own if row["method"] == name} for name in names]
    prompts = sorted(set.intersection(*each))
    own = [row for row in own if (row["split"], row["number"]) in set(prompts)]
    table = np.zeros((len(names), len(prompts), 2))  # hits and objects
    for row in own:
        if row["method"] in published:
            hits = SCORES["in box"](row)
            table[names.index(row["method"]), prompts.index((row["split"], row["number"]))] += sum(hits), len(hits)
    shares = lambda some: (some[..., 0].sum(axis=1) / np.maximum(some[..., 1].sum(axis=1), 1)).tolist()  # noqa: E731
    picked = np.random.default_rng(seed).integers(len(prompts), size=(draws, len(prompts)))
    taus = [kendall(shares(table[:, some]), list(published.values())) for some in picked]
    defined = [tau for tau in taus if not math.isnan(tau)] or [math.nan]
    low, high = np.quantile(defined, [0.025, 0.975])
    return names, kendall(shares(table), list(published.values())), (float(low), float(high))


Groups: TypeAlias = Mapping[tuple[str, int | None], Sequence[Row]]  # by method and passes


def print_tables(rows: Sequence[Row]) -> None:
    """All scores of each method at each number of passes; its objects in their boxes by split; the front; tau.

    Methods stand side by side on the pictures that all of them have; by split, each has all of its own.
    """
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["passes"]), []).append(row)
    if not groups:
        print("there are no pictures")
        return
    print("\ndrift: RMS difference to the picture without boxes; seconds: of CPU, one thread; intervals of 95 %")
    for level in dict.fromkeys(passes for _, passes in groups):
        shared = _shared({key: own for key, own in groups.items() if key[1] == level})
        count = len(next(iter(shared.values()), ()))
        print(f"\n{'passes ' + _level(level) + f': {count} pictures':<29} " + " ".join(f"{n:>14}" for n in SCORES))
        for (name, _), own in shared.items():
            print(f"{name:<29} " + " ".join(f"{_cell(own, *one):>14}" for one in SCORES.items()))
    print("\nobjects in their box, by split; relations: true; strokes: mean distance of the object's centre")
    print(f"{'method':<24} {'passes':>6} " + " ".join(f"{split:>16}" for split in SPLITS))
    for (name, passes), own in groups.items():
        cells = (_by_split([row for row in own if row["split"] == split], split) for split in SPLITS)
        print(f"{name:<24} {_level(passes):>6} " + " ".join(f"{cell:>16}" for cell in cells))
    _print_front(_shared(groups))
    shared_names = {row["method"] for row in rows if row["passes"] is None and row["split"] in COUNTED}
    if len(shared_names & set(PUBLISHED)) > 1:
        names, tau, (low, high) = agreement(rows)
        print(
            f"\nKendall's tau with LoCo's spatial column: {tau:.2f} ({low:.2f} to {high:.2f}) over {', '.join(names)}"
        )


def _shared(groups: Groups) -> Groups:
    """The pictures with boxes that every method has."""
    boxed = {key: {_picture(row): row for row in own if "ious" in row} for key, own in groups.items()}
    common = set.intersection(*(set(own) for own in boxed.values()))
    return {key: [own[picture] for picture in own if picture in common] for key, own in boxed.items()}


def _picture(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("split", "scenes", "number", "seed"))


def _print_front(groups: Groups) -> None:
    """The methods that no other beats in both seconds and objects in their boxes."""
    points = {
        f"{name} at {_level(passes)}": (mean(own, SCORES["seconds"]), mean(own, SCORES["in box"]))
        for (name, passes), own in groups.items()
        if own
    }
    count = len(next(iter(groups.values())))
    print(f"\nPareto front of seconds and objects in their box, on {count} pictures:")
    for name in front(points):
        print(f"{name:<30} {points[name][0]:.2f} s, {points[name][1]:.1%}")


def _level(passes: int | None) -> str:
    return "own" if passes is None else str(passes)


def _cell(rows: Sequence[Row], name: str, values: Values) -> str:
    value = mean(rows, values)
    if math.isnan(value):
        return "-"
    if name in ("passes", "seconds"):
        return f"{value:.3g}"
    low, high = bootstrap(rows, values)
    if name in ("area", "drift"):
        return f"{value:.2f} {low:.2f}-{high:.2f}"
    return f"{value:.0%} {100 * low:.0f}-{100 * high:.0f}"


def _by_split(rows: Sequence[Row], split: str) -> str:
    name, values = BY_SPLIT.get(split, ("in box", SCORES["in box"]))
    value = mean(rows, values)
    if math.isnan(value):
        return "-"
    low, high = bootstrap(rows, values)
    if name == "distance":
        return f"{value:.3f} {low:.2f}-{high:.2f}"
    return f"{value:.0%} {100 * low:.0f}-{100 * high:.0f}"
