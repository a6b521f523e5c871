"""The calibrations of `report.placed`: fitted to some of the league's prompts, tested on others.

Reads the pictures that `python -m bench league` has drawn: of the default, and of all other methods that are guided. In
turn, each tenth of the prompts is tested with what the other prompts give.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff.guidance.placed import CALIBRATIONS, OTHER, OWN, Calibration

from .league import DEFAULT, read
from .machine import print_header
from .scores import IN_BOX, Row
from .table import Row as Bound, finish, print_head, print_row

FOLDS = 10
BINS = 10


@dataclass(frozen=True, eq=False)
class Objects:
    """Features [N,F], whether each came out in its box [N], and the prompt of each."""

    features: Tensor
    hits: Tensor
    prompts: Sequence[object]

    def where(self, there: Tensor) -> Objects:
        """Those for which `there` [N] holds."""
        prompts = [prompt for prompt, one in zip(self.prompts, there.tolist(), strict=True) if one]
        return Objects(self.features[there], self.hits[there], prompts)


def objects(rows: Sequence[Row]) -> Objects:
    """The objects with boxes of pictures that were looked at."""
    prompts = [(row["split"], row["scenes"], row["number"]) for row in rows for _ in row["ious"]]
    hits = torch.tensor([value >= IN_BOX for row in rows for value in row["ious"]], dtype=torch.float64)
    return Objects(torch.tensor([one for row in rows for one in row["seen"]], dtype=torch.float64), hits, prompts)


def fit(some: Objects, ridge: float = 1.0) -> Calibration:
    """Logistic regression with a little weight decay on standardised features, by Newton's method."""
    centre, spread = some.features.mean(dim=0), some.features.std(dim=0).clamp_min(1e-9)
    design = torch.cat([(some.features - centre) / spread, torch.ones(len(some.hits), 1).double()], dim=1)
    decay = ridge * torch.ones(design.shape[1]).double()
    decay[-1] = 0
    weights = torch.zeros_like(decay)
    for _ in range(50):
        chance = (design @ weights).sigmoid()
        slope = design.T @ (chance - some.hits) + decay * weights
        curve = (design.T * (chance * (1 - chance))) @ design + torch.diag(decay)
        weights = weights - torch.linalg.solve(curve, slope)
    own = weights[:-1] / spread
    return Calibration(tuple(round(w, 4) for w in own.tolist()), round(float(weights[-1] - own @ centre), 4))


def area_under_curve(chance: Sequence[float], hits: Sequence[bool]) -> float:
    """Of sensitivity over false alarms: how often an object in its box is given more than one that is not."""
    values, hit = np.asarray(chance), np.asarray(hits, dtype=bool)
    more, less = values[hit][:, None], values[~hit][None]
    return float(((more > less) + 0.5 * (more == less)).mean()) if hit.any() and (~hit).any() else math.nan


def calibration_error(chance: Sequence[float], hits: Sequence[bool], bins: int = BINS) -> float:
    """The mean over bins of equally many objects of |mean chance - share of hits|, weighted by their number."""
    order = np.argsort(chance, kind="stable")
    values, hit = np.asarray(chance)[order], np.asarray(hits, dtype=float)[order]
    parts = np.array_split(np.arange(len(values)), bins)
    return float(
        sum(abs(values[part].mean() - hit[part].mean()) * len(part) for part in parts if len(part)) / len(values)
    )


def cross_fitted(some: Objects, folds: int = FOLDS, seed: int = 0) -> Tensor:
    """What calibrations say of each object [N] that were fitted without its prompt."""
    names = sorted(set(some.prompts))  # type: ignore[type-var]
    fold = dict(zip(names, (np.random.default_rng(seed).permutation(len(names)) % folds).tolist(), strict=True))
    own = torch.tensor([fold[name] for name in some.prompts])
    said = torch.zeros(len(own), dtype=torch.float64)
    for k in range(folds):
        others = Objects(some.features[own != k], some.hits[own != k], ())
        said[own == k] = chances(fit(others), some.features[own == k])
    return said


def chances(calibration: Calibration, features: Tensor) -> Tensor:
    """[N]."""
    return (features @ torch.tensor(calibration.weights).double() + calibration.bias).sigmoid()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench placed`."""
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[Path("league.jsonl")], metavar="FILE", help="files of bench league"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="some methods alone")


def run(args: argparse.Namespace) -> int:
    """Fit, test, print."""
    every = [row for file in args.results for row in read(file)]
    rows = [row for row in every if "ious" in row and not any(None in one for one in row.get("seen", [[None]]))]
    rows = [row for row in rows if args.methods is None or row["method"] in args.methods]
    if len({(row["split"], row["number"]) for row in rows}) < FOLDS:
        files = ", ".join(map(str, args.results))
        raise ValueError(
            f"{files}: fewer than {FOLDS} prompts have pictures with what was `seen` in them, which older files do not "
            "hold; expected those of bench league --prompts 4"
        )
    some = objects(rows)
    own = torch.tensor([_is_default(row) for row in rows for _ in row["ious"]])
    said, tested = torch.zeros(len(own), dtype=torch.float64), torch.zeros(len(own), dtype=torch.bool)
    print_header("bench placed", {"objects": str(len(own)), "methods": ", ".join(sorted({r["method"] for r in rows}))})
    bounds: list[Bound] = []
    for default, name in ((False, "other guidance"), (True, DEFAULT)):
        part = some.where(own == default)
        if len(set(part.prompts)) >= FOLDS:
            said[own == default], tested[own == default] = cross_fitted(part), True
            known = CALIBRATIONS[OWN if default else OTHER]
            print(f"{name}, fitted: {fit(part)}\n{'in the code':>{len(name)}}: {known}\n")
            bounds += _bounds(name, said[own == default], part.hits.bool(), (0.15, 0.05))
    print_head()
    for bound in bounds:
        print_row(bound)
    print()
    said, came = said[tested], some.hits[tested]
    for part in np.array_split(said.argsort().numpy(), BINS):
        print(f"said {said[part].mean():>6.1%}, came {came[part].mean():>6.1%} of {len(part)}")
    return finish(bounds, args.json)


def _is_default(row: Row) -> bool:
    """Whether its report has the default's calibration: with tries, too."""
    return row["method"].split(",")[0] == DEFAULT and row["passes"] is None


def _bounds(name: str, said: Tensor, hits: Tensor, bounds: tuple[float, float]) -> Iterator[Bound]:
    shape = f"{len(hits)} objects, {hits.double().mean():.0%} in"
    missed = 1 - area_under_curve(said.tolist(), hits.tolist())
    perfect = np.random.default_rng(0).random((200, len(said))) < said.numpy()  # what chance alone makes of it
    least = np.mean([calibration_error(said.tolist(), some) for some in perfect])
    yield Bound(f"{name}: 1 - area under the curve", shape, missed, bounds[0], "share")
    error = calibration_error(said.tolist(), hits.tolist())
    yield Bound(f"{name}: calibration error", shape, error, bounds[1], f"{BINS} bins", f"a perfect one: {least:.3f}")
