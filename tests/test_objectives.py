"""Objectives equal slow loops over their papers' formulas, and their gradients equal finite differences."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import UNET
from hypothesis import given, settings, strategies as st
from torch import Tensor

import minidiff
from minidiff.guidance.evaluate import evaluate
from minidiff.guidance.layout import Layout, PlacedObject, make_layout
from minidiff.guidance.objectives import OBJECTIVES, Objective
from minidiff.guidance.objectives.extent import COVER, SPREAD
from minidiff.guidance.objectives.relation import APART
from minidiff.guidance.relations import Relation, relation_tensor
from minidiff.networks.attention import ALL, BOX_MASS, COLUMNS, HEAD_MEAN, Inputs, Keep, Maps, Record, mask_name
from minidiff.networks.config import UNetConfig
from minidiff.networks.sites import PLACES, Site
from minidiff.networks.unet import UNet
from minidiff.vocabulary import RELATIONS

Box = tuple[float, float, float, float]

LENGTH = 9  # text tokens
SITE = Site("mid", 0, 0, "cross")
# two sites on one grid, so that averages over sites, grids and heads differ
SITES = {
    SITE: (3, 2, 4),  # heads, h, w
    Site("down", 1, 0, "cross"): (2, 5, 3),
    Site("up", 1, 0, "cross"): (2, 5, 3),
    Site("up", 1, 1, "cross"): (4, 5, 3),
    Site("up", 2, 0, "cross"): (1, 6, 6),
}
# per image and object: boxes, token positions, weight. With overlaps, a box below cell size, one in the corner.
OBJECTS: list[list[tuple[list[Box], tuple[int, ...], float]]] = [
    [
        ([(0.1, 0.2, 0.55, 0.7)], (1, 2), 1.0),
        ([(0.4, 0.3, 0.9, 1.0)], (4,), 2.0),
        ([(0.71, 0.81, 0.73, 0.84)], (5, 6, 7), 0.5),
    ],
    [([(0.0, 0.0, 0.5, 0.5), (0.75, 0.5, 1.0, 1.0)], (3,), 1.5)],
    [([(0.2, 0.0, 1.0, 0.3)], (2,), 1.0), ([(0.3, 0.55, 0.6, 0.9)], (2, 3), 3.0)],
]
COUNT = max(len(some) for some in OBJECTS)
# per image: relations between the objects "a", "b", "c"
RELATED: list[list[Relation]] = [
    [Relation("a", "right of", "b"), Relation("c", "smaller than", "a"), Relation("c", "above", "b")],
    [],
    [Relation("b", "left of", "a"), Relation("b", "larger than", "a"), Relation("a", "below", "b")],
]


def part(start: float, end: float, cell: int, cells: int) -> float:
    """The fraction of a cell that an interval covers."""
    return max(0.0, min(end, (cell + 1) / cells) - max(start, cell / cells)) * cells


def coverage(boxes: Sequence[Box], h: int, w: int) -> list[list[float]]:
    """The coverage of boxes that do not overlap."""
    return [
        [sum(part(y0, y1, r, h) * part(x0, x1, c, w) for x0, y0, x1, y1 in boxes) for c in range(w)] for r in range(h)
    ]


def layout_by_hand(dtype: torch.dtype = torch.float64) -> Layout:
    grids = {(h, w) for _, h, w in SITES.values()}
    masks = {grid: torch.zeros(len(OBJECTS), COUNT, *grid, dtype=dtype) for grid in grids}
    token_weights = torch.zeros(len(OBJECTS), COUNT, LENGTH, dtype=dtype)
    weights = torch.zeros(len(OBJECTS), COUNT, dtype=dtype)
    for b, some in enumerate(OBJECTS):
        for o, (boxes, tokens, weight) in enumerate(some):
            weights[b, o] = weight
            for token in tokens:
                token_weights[b, o, token] = 1 / len(tokens)
            for h, w in grids:
                masks[h, w][b, o] = torch.tensor(coverage(boxes, h, w), dtype=dtype)
    words = torch.zeros(len(OBJECTS), LENGTH, dtype=dtype)
    words[:, 1:8] = 1
    relations = relation_tensor([list("abc"), list("a"), list("ab")], RELATED).to(dtype)
    siblings = torch.zeros(len(OBJECTS), COUNT, COUNT, dtype=dtype)
    for b, some in enumerate(OBJECTS):
        for one, other in itertools.permutations(range(len(some)), 2):
            siblings[b, one, other] = set(some[one][1]) == set(some[other][1])
    return Layout(masks, token_weights, words, weights, relations, siblings, torch.zeros_like(weights))


def kinds_of(objective: Objective) -> list[str]:
    """The kinds of sites that an objective reads."""
    tests = [term.sites.test for term in objective.terms]
    found = []
    for kind in ("cross", "self"):
        some = [(Site(place, 1, 0, kind), level) for place in PLACES for level in (0, 1)]
        found += [kind] if any(test(site, (8, 8), level) for test in tests for site, level in some) else []
    return found


def random_maps(spread: float = 2.0, seed: int = 0, kinds: Sequence[str] = ("cross",)) -> Maps:
    """All probabilities [B,H,h,w,L], float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        replace(site, kind=kind): (len(OBJECTS), heads, h, w, LENGTH if kind == "cross" else h * w)
        for kind in kinds
        for site, (heads, h, w) in SITES.items()
    }
    return {
        site: (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)
        for site, shape in shapes.items()
    }


def kept(objective: Objective, maps: Maps, layout: Layout) -> Maps:
    """The maps as a UNet returns them."""
    return {site: objective.keep(site, probs, layout.inputs()) for site, probs in maps.items()}


# ---- slow formulas. Each returns the loss of one image from its maps {site: [H,h,w,L]}, boxes, tokens and weights.


Objects = list[tuple[list[Box], tuple[int, ...], float]]


def slow_inside_of(maps: Maps, objects: Objects, loss: Callable[[float], float]) -> float:
    """The weighted mean of a loss of the fraction inside. Sites have equal weight, however many heads they have."""
    whole = 0.0
    for boxes, tokens, weight in objects:
        terms = []
        for probs in maps.values():
            heads, h, w, _ = probs.shape
            mask = coverage(boxes, h, w)
            for token in tokens:
                for head in range(heads):
                    inside = sum(mask[r][c] * float(probs[head, r, c, token]) for r in range(h) for c in range(w))
                    total = sum(float(probs[head, r, c, token]) for r in range(h) for c in range(w))
                    terms.append(loss(inside / total) / (len(maps) * len(tokens) * heads))
        whole += weight * sum(terms)
    return whole / sum(weight for _, _, weight in objects)


def slow_layout(maps: Maps, objects: Objects) -> float:
    return slow_inside_of(maps, objects, lambda inside: (1 - inside) ** 2)


def by_grid(maps: Maps) -> dict[tuple[int, int], list[list[list[float]]]]:
    """Means over heads, then over the sites of a grid: [h][w][L]."""
    found = {}
    for h, w in {tuple(probs.shape[1:3]) for probs in maps.values()}:
        sites = [probs for probs in maps.values() if tuple(probs.shape[1:3]) == (h, w)]
        found[h, w] = [
            [
                [
                    sum(sum(float(p[head, r, c, k]) for head in range(len(p))) / len(p) for p in sites) / len(sites)
                    for k in range(sites[0].shape[3])
                ]
                for c in range(w)
            ]
            for r in range(h)
        ]
    return found


def sharpened(mean: list[list[list[float]]], tokens: Sequence[int], factor: float) -> list[list[float]]:
    """softmax over all tokens but the first, and the mean over the object's."""
    found = []
    for row in mean:
        found.append([])
        for cell in row:
            exps = [math.exp(factor * value) for value in cell[1:]]
            found[-1].append(sum(exps[token - 1] for token in tokens) / sum(exps) / len(tokens))
    return found


def mirrored(i: int, n: int) -> int:
    """Reflect an index just outside at the outermost cell."""
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


def filtered(maps: list[list[float]], kernel: list[list[float]]) -> list[list[float]]:
    h, w = len(maps), len(maps[0])
    if min(h, w) == 1:  # nothing to reflect: replicate the outermost cell

        def at(i: int, n: int) -> int:
            return min(max(i, 0), n - 1)
    else:
        at = mirrored
    return [
        [
            sum(kernel[i + 1][j + 1] * maps[at(r + i, h)][at(c + j, w)] for i in (-1, 0, 1) for j in (-1, 0, 1))
            for c in range(w)
        ]
        for r in range(h)
    ]


def gaussian(sigma: float) -> list[list[float]]:
    """exp(-(d / (2 sigma))^2) on each axis, as in Attend-and-Excite's code."""
    line = [math.exp(-((d / (2 * sigma)) ** 2)) for d in (-1, 0, 1)]
    return [[a * b / sum(line) ** 2 for b in line] for a in line]


def excited(maps: Maps, tokens: Sequence[int]) -> dict[tuple[int, int], list[list[float]]]:
    """The sharpened, smoothed map A_o of each object on each grid."""
    return {grid: filtered(sharpened(mean, tokens, 100), gaussian(0.5)) for grid, mean in by_grid(maps).items()}


def cells(h: int, w: int) -> list[tuple[int, int]]:
    return [(r, c) for r in range(h) for c in range(w)]


def slow_attend_and_excite(maps: Maps, objects: Objects) -> float:
    losses = []
    for _, tokens, weight in objects:
        on_grids = [1 - max(max(row) for row in found) for found in excited(maps, tokens).values()]
        losses.append(weight * sum(on_grids) / len(on_grids))
    return max(losses)


def mean_of_top(values: list[float], count: float) -> float:
    """Mean of the `count` largest cells, at least one; a fractional count weights the last one."""
    count = max(count, 1.0)
    left, total = count, 0.0
    for value in sorted(values, reverse=True):
        taken = min(left, 1.0)
        total, left = total + taken * value, left - taken
        if left <= 0:
            break
    return total / (count - left)


def slow_boxdiff(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, tokens, weight in objects:
        losses = []
        for (h, w), found in excited(maps, tokens).items():
            mask = coverage(boxes, h, w)
            area = sum(map(sum, mask))
            inside = mean_of_top([mask[r][c] * found[r][c] for r, c in cells(h, w)], 0.2 * area)
            outside = mean_of_top([(1 - mask[r][c]) * found[r][c] for r, c in cells(h, w)], 0.2 * (h * w - area))
            loss = 1 - inside + outside
            across = (
                [max(found[r][c] for r in range(h)) for c in range(w)],
                [max(mask[r][c] for r in range(h)) for c in range(w)],
            )
            down = [max(row) for row in found], [max(row) for row in mask]
            for line, wanted in (across, down):
                n = len(line)
                ends = [0.0, *wanted, 0.0]
                # an edge lies before cell e where the projection changes; L = 1: cells e-1, e and e+1 are near it
                edges = [e for e in range(n + 1) if ends[e] != ends[e + 1]]
                near = {i for e in edges for i in (e - 1, e, e + 1) if 0 <= i < n}
                loss += sum(abs(line[i] - wanted[i]) for i in near) / n
            losses.append(loss)
        whole += weight * sum(losses) / len(losses)
    return whole


def slow_refocusing(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, tokens, weight in objects:
        losses = []
        for (h, w), found in excited(maps, tokens).items():
            own = coverage(boxes, h, w)
            masks = [coverage(others, h, w) for others, _, _ in objects]
            loss = 1 - max(own[r][c] * found[r][c] for r, c in cells(h, w))
            for other in masks:  # its own mask among them gives m (1 - m), the outside part of its edge cells
                loss += max(other[r][c] * (1 - own[r][c]) * found[r][c] for r, c in cells(h, w))
            loss += 0.5 * max((1 - max(m[r][c] for m in masks)) * found[r][c] for r, c in cells(h, w))
            losses.append(loss)
        whole += weight * sum(losses) / len(losses)
    return whole / sum(weight for _, _, weight in objects)


def bounding(found: list[list[bool]]) -> list[list[float]]:
    rows = [r for r, row in enumerate(found) if any(row)]
    columns = [c for c in range(len(found[0])) if any(row[c] for row in found)]
    return [
        [
            float(bool(rows) and rows[0] <= r <= rows[-1] and columns[0] <= c <= columns[-1])
            for c in range(len(found[0]))
        ]
        for r in range(len(found))
    ]


def slow_rnb_parts(maps: Maps, objects: Objects) -> list[tuple[float, list[tuple[float, float]]]]:
    """For each object: its loss, and (iou, loss) on each grid."""
    means = by_grid(maps)
    found_of = []
    for boxes, tokens, _ in objects:
        parts = []
        for (h, w), mean in means.items():
            mask, inner = coverage(boxes, h, w), cells(h, w)
            raw = [[sum(cell[token] for token in tokens) / len(tokens) for cell in row] for row in mean]
            low, high = min(map(min, raw)), max(map(max, raw))
            found = [[(value - low) / (high - low + 1e-8) for value in row] for row in raw]
            area = sum(map(sum, mask))
            mean_in = sum(mask[r][c] * found[r][c] for r, c in inner) / area if area else 0.0
            mean_out = sum((1 - mask[r][c]) * found[r][c] for r, c in inner) / (h * w - area) if area < h * w else 0.0
            threshold = 0.4 * mean_in + 0.6 * mean_out
            bright = bounding([[value > threshold for value in row] for row in found])
            both = sum(bright[r][c] * mask[r][c] for r, c in inner)
            iou = both / sum(max(bright[r][c], mask[r][c]) for r, c in inner)
            soft = [[1 / (1 + math.exp(-20 * (value - threshold))) for value in row] for row in found]
            size = sum(map(sum, bright)) or 1.0  # a uniform map has no bright cells
            hard_share = sum(mask[r][c] ** 2 * bright[r][c] for r, c in inner) / size
            soft_share = sum(mask[r][c] * soft[r][c] for r, c in inner) / sum(map(sum, soft))
            loss = (1 - (1 - iou) * hard_share) + (1 - 0.5 * (1 - iou) * soft_share)
            brightest_in = max(mask[r][c] * raw[r][c] for r, c in inner)
            brightest_out = max((1 - mask[r][c]) * raw[r][c] for r, c in inner)
            if len(objects) > 1 and brightest_in < brightest_out:
                sharp = sharpened(mean, tokens, 120)
                top = max(map(max, sharp))
                smooth = filtered([[value / top for value in row] for row in sharp], gaussian(3.0))
                sobel = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
                across = filtered(smooth, sobel)
                down = filtered(smooth, [list(column) for column in zip(*sobel, strict=True)])
                edges = [[math.sqrt(across[r][c] ** 2 + down[r][c] ** 2 + 1e-8) for c in range(w)] for r in range(h)]
                edge_share = sum(mask[r][c] * edges[r][c] for r, c in inner) / sum(map(sum, edges))
                loss += 1 - (1 - iou) * edge_share
            parts.append((iou, loss if iou < 0.85 else 0.0))
        found_of.append((sum(loss for _, loss in parts) / len(parts), parts))
    return found_of


def slow_rnb(maps: Maps, objects: Objects) -> float:
    losses = [loss for loss, _ in slow_rnb_parts(maps, objects)]
    weights = [weight for _, _, weight in objects]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)


def slow_inside(maps: Maps, objects: Objects) -> float:
    return slow_inside_of(maps, objects, lambda inside: -math.log(inside))


def moments(line: list[float]) -> tuple[float, float]:
    """Centre and standard deviation of a histogram over [0,1], uniform within each cell."""
    n, total = len(line), sum(line)
    centre = sum(value * (i + 0.5) / n for i, value in enumerate(line)) / total
    second = sum(value * (((i + 0.5) / n - centre) ** 2 + 1 / (12 * n**2)) for i, value in enumerate(line)) / total
    return centre, math.sqrt(second)


def slow_extent(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, tokens, weight in objects:
        losses = []
        for (h, w), mean in by_grid(maps).items():
            found = [[sum(cell[token] for token in tokens) / len(tokens) for cell in row] for row in mean]
            mask, loss = coverage(boxes, h, w), 0.0
            for turn in (False, True):
                lines = []
                for picture in (found, mask):
                    rows = picture if turn else [list(column) for column in zip(*picture, strict=True)]
                    lines.append(moments([sum(row) for row in rows]))
                (centre, spread), (wanted, size) = lines
                width = math.sqrt(12) * size  # std of a uniform bar
                loss += 3 * ((centre - wanted) / width) ** 2 + math.log(spread / (SPREAD * size)) ** 2
            values = [value for row in found for value in row]
            entropy = -sum(value / sum(values) * math.log(value / sum(values)) for value in values)
            loss += max(0.0, math.log(COVER * sum(map(sum, mask))) - entropy) ** 2
            losses.append(loss)
        whole += weight * sum(losses) / len(losses)
    return whole / sum(weight for _, _, weight in objects)


def slow_relation(maps: Maps, objects: Objects) -> float:
    related = RELATED[next(b for b, some in enumerate(OBJECTS) if some is objects)]
    losses = []
    for mean in by_grid(maps).values():
        found = {}
        for name, (_, tokens, _) in zip("abc", objects, strict=False):
            rows = [[sum(cell[token] for token in tokens) / len(tokens) for cell in row] for row in mean]
            (x, wide), (y, tall) = (moments([sum(line) for line in some]) for some in (zip(*rows, strict=True), rows))
            found[name] = (x, y, math.log(wide * tall) / 2)
        loss = 0.0
        for first, relation, second in related:
            k, sign = RELATIONS[relation]
            more = sign * (found[first][k] - found[second][k]) / APART[k]
            loss += objects["abc".index(first)][2] * max(0.0, 1 - more) ** 2
        losses.append(loss)
    return sum(losses) / len(losses)


def slow_tradiffusion(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, tokens, weight in objects:
        for probs in maps.values():
            heads, h, w, _ = probs.shape
            mask = coverage(boxes, h, w)
            most = max(map(max, mask))
            inside = [(r, c) for r, c in cells(h, w) if mask[r][c] >= most / 2]
            for head in range(heads):
                near = far = total = 0.0
                for r, c in cells(h, w):
                    value = sum(float(probs[head, r, c, token]) for token in tokens)
                    away = 1 + min(math.hypot(r - y, c - x) for y, x in inside)
                    near, far, total = near + value / away, far + value * away, total + value
                whole += weight * ((1 - near / total) ** 2 + 10 * (1 - total / far) ** 2) / (heads * len(maps))
    return whole / sum(weight for _, _, weight in objects)


def of_kind(maps: Maps, kind: str) -> Maps:
    return {site: probs for site, probs in maps.items() if site.kind == kind}


def looks(mean: list[list[list[float]]]) -> dict[tuple[tuple[int, int], tuple[int, int]], float]:
    """Self-attention from one cell to another."""
    inner = cells(len(mean), len(mean[0]))
    return {(u, v): mean[u[0]][u[1]][k] for u in inner for k, v in enumerate(inner)}


def slow_self_refocusing(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, _, weight in objects:
        losses = []
        for (h, w), mean in by_grid(maps).items():
            mask, share = coverage(boxes, h, w), looks(mean)
            out = sum(mask[u[0]][u[1]] * (1 - mask[v[0]][v[1]]) * value for (u, v), value in share.items())
            losses.append(out / sum(map(sum, mask)))
        whole += weight * sum(losses) / len(losses)
    return whole / sum(weight for _, _, weight in objects)


def slow_self_cross(maps: Maps, objects: Objects) -> float:
    looking, whole = by_grid(of_kind(maps, "self")), 0.0
    found = [excited(of_kind(maps, "cross"), tokens) for _, tokens, _ in objects]
    for i, (_, _, weight) in enumerate(objects):
        for grid, mean in looking.items():
            share = looks(mean)
            for j in range(len(objects)):
                if j == i:
                    continue
                own = {u: found[j][grid][u[0]][u[1]] for u in cells(*grid)}
                bright = otsu(list(own.values()))
                seen = [[sum(own[u] * share[u, (r, c)] for u in own if own[u] >= bright) for c in range(grid[1])]
                        for r in range(grid[0])]  # fmt: skip
                seen, total = filtered(seen, gaussian(0.5)), sum(map(sum, filtered(seen, gaussian(0.5))))
                both = sum(min(seen[r][c] / total, found[i][grid][r][c]) for r, c in cells(*grid))
                whole += weight * both / (len(objects) - 1) / len(looking)
    return whole / sum(weight for _, _, weight in objects)


def slow_initno(maps: Maps, objects: Objects) -> float:
    looking, losses = by_grid(of_kind(maps, "self")), []
    found = [excited(of_kind(maps, "cross"), tokens) for _, tokens, _ in objects]
    for grid, mean in looking.items():
        inner, share, seen = cells(*grid), looks(mean), []
        response = 1 - min(max(map(max, one[grid])) for one in found)
        for one in found:
            peak = max(inner, key=lambda u, heat=one[grid]: heat[u[0]][u[1]])
            seen.append(
                filtered([[share[peak, (r, c)] for c in range(grid[1])] for r in range(grid[0])], gaussian(0.5))
            )
        conflicts = [
            sum(min(one[r][c], other[r][c]) for r, c in inner) / sum(one[r][c] + other[r][c] for r, c in inner)
            for i, one in enumerate(seen)
            for other in seen[:i]
        ]
        losses.append(response + (sum(conflicts) / len(conflicts) if conflicts and response <= 0.5 else 0))
    return sum(losses) / len(losses)


def otsu(values: list[float]) -> float:
    """The least value of the brighter class."""

    def within(least: float) -> float:
        """The sum of both classes' squared distances from their means."""
        total = 0.0
        for some in ([x for x in values if x >= least], [x for x in values if x < least]):
            total += sum((x - sum(some) / len(some)) ** 2 for x in some)
        return total

    return min(values, key=within)


def slow_conform(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for _, tokens, weight in objects:
        losses = []
        for mean in by_grid(maps).values():
            line = {
                k: [value for row in filtered(sharpened(mean, (k,), 100), gaussian(0.5)) for value in row]
                for _, others, _ in objects
                for k in others
            }

            def near(a: int, b: int, line: dict[int, list[float]] = line) -> float:
                return math.exp(2 * sum(map(math.prod, zip(line[a], line[b], strict=True)))
                                / math.hypot(*line[a]) / math.hypot(*line[b]))  # fmt: skip

            for a in tokens:
                shared = {k for _, others, _ in objects if a in others for k in others}
                away = sum(near(a, n) for n in line if n not in shared)
                losses += [-math.log(near(a, p) / (near(a, p) + away)) for p in tokens]
        whole += weight * sum(losses) / len(losses)
    return whole / sum(weight for _, _, weight in objects)


def slow_bounded_attention(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, tokens, weight in objects:
        for kind, factor in (("cross", 1.5), ("self", 0.5)):
            inside = outside = 0.0
            for probs in of_kind(maps, kind).values():
                h, w = probs.shape[1:3]
                mask = coverage(boxes, h, w)
                masks = [coverage(others, h, w) for others, _, _ in objects]
                for k, (r, c) in enumerate(cells(h, w)):
                    for y, x in cells(h, w):
                        if kind == "self":
                            value = float(probs[:, y, x, k].mean()) * mask[r][c]
                        elif (y, x) == (r, c):  # token 8 is the end marker
                            (value,) = [float(probs[:, r, c, [*tokens, 8]].mean(0).sum())]
                        else:
                            continue
                        inside += value * mask[y][x]
                        outside += value * (1 - max(other[y][x] for other in masks))
            whole += weight * factor * (1 - inside / (inside + len(objects) * outside)) ** 2
    return whole / sum(weight for _, _, weight in objects)


def slow_winwinlay(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, tokens, weight in objects:
        for probs in maps.values():
            heads, h, w, _ = probs.shape
            mask = coverage(boxes, h, w)
            (x, wide), (y, tall) = (moments([sum(line) for line in some]) for some in (zip(*mask, strict=True), mask))
            bell = {
                (r, c): math.exp(
                    -(((c + 0.5) / w - x) ** 2 / (0.7 * 3**0.5 * wide) ** 2) / 2
                    - (((r + 0.5) / h - y) ** 2 / (0.7 * 3**0.5 * tall) ** 2) / 2
                )
                for r, c in cells(h, w)
            }
            for head in range(heads):
                found = {(r, c): sum(float(probs[head, r, c, k]) for k in tokens) for r, c in cells(h, w)}
                total = sum(found.values())
                inside = sum(found[r, c] * mask[r][c] for r, c in found) / total
                away = sum(
                    found[at] / total * math.log(found[at] / total / max(bell[at] / sum(bell.values()), 1e-8))
                    for at in found
                )
                whole += weight * ((1 - inside) ** 2 + 0.5 * away) / (heads * len(maps))
    return whole / sum(weight for _, _, weight in objects)


def slow_ilgd(maps: Maps, objects: Objects) -> float:
    whole = 0.0
    for boxes, tokens, weight in objects:
        losses = []
        for (h, w), mean in by_grid(maps).items():
            mask, loss = coverage(boxes, h, w), 0.0
            for r, c in cells(h, w):
                value = sum(mean[r][c][k] for k in tokens) / len(tokens)
                loss += value * (1 - mask[r][c]) - value * mask[r][c] + mask[r][c]
            losses.append(loss)
        whole += weight * sum(losses) / len(losses)
    return whole / sum(weight for _, _, weight in objects)


BETWEEN = ("relation", "self_cross", "conform")
"""Objectives that one object alone gives nothing to do."""
SLOW: dict[str, Callable[[Maps, Objects], float]] = {
    "inside": slow_inside,
    "extent": slow_extent,
    "layout": slow_layout,
    "attend_and_excite": slow_attend_and_excite,
    "boxdiff": slow_boxdiff,
    "refocusing": slow_refocusing,
    "relation": slow_relation,
    "rnb": slow_rnb,
    "tradiffusion": slow_tradiffusion,
    "self_refocusing": slow_self_refocusing,
    "initno": slow_initno,
    "self_cross": slow_self_cross,
    "conform": slow_conform,
    "bounded_attention": slow_bounded_attention,
    "winwinlay": slow_winwinlay,
    "ilgd": slow_ilgd,
}


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_equals_a_slow_formula(name: str, spread: float) -> None:
    objective = OBJECTIVES[name]
    layout, maps = layout_by_hand(), random_maps(spread, kinds=kinds_of(objective))
    found = objective(kept(objective, maps, layout), layout)
    expected = [SLOW[name]({s: p[b] for s, p in maps.items()}, objects) for b, objects in enumerate(OBJECTS)]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_rnb_has_no_loss_once_the_boxes_agree() -> None:
    grid = (4, 5)
    # token 3 is bright in the second and third column of the upper half, which is its box
    layout = make_layout([[PlacedObject("a", (3,), ((0.2, 0.0, 0.6, 0.5),))]], [7], LENGTH, [grid])
    probs = torch.full((1, *grid, LENGTH), 0.05)
    probs[:, :2, 1:3, 3] = 0.6
    assert minidiff.rnb_loss({SITE: probs}, layout).item() == 0
    assert minidiff.rnb_loss({SITE: probs.flip(1)}, layout).item() > 1  # bright below it
    probs[:, :2, :3, 3] = 0.6  # an IoU of 4 / 6
    assert minidiff.rnb_loss({SITE: probs}, layout).item() > 0


def anything(maps: Maps, layout: Layout) -> Tensor:
    return layout.weights


def test_mass_inside_equals_a_slow_formula_for_each_kind_of_keep() -> None:
    layout, maps = layout_by_hand(), random_maps()
    for keep in (ALL, BOX_MASS, HEAD_MEAN):
        read = minidiff.objective(keep=keep)(anything)
        kept_maps = {site: keep(site, probs, layout.inputs()) for site, probs in maps.items()}
        _, _, found = read.look(kept_maps, layout, layout.inputs())
        assert found.min() >= 0
        assert found.max() <= 1
        for b, objects in enumerate(OBJECTS):
            for o, (boxes, tokens, _) in enumerate(objects):
                shares = []
                for probs in maps.values():
                    heads = probs[b].mean(dim=0, keepdim=True) if keep is HEAD_MEAN else probs[b]
                    mask = torch.tensor(coverage(boxes, *heads.shape[1:3]), dtype=torch.float64)
                    of_heads = [
                        float((mask * head[..., k]).sum() / head[..., k].sum()) for head in heads for k in tokens
                    ]
                    shares.append(sum(of_heads) / len(of_heads))
                assert float(found[b, o]) == pytest.approx(sum(shares) / len(shares), rel=1e-10)
            assert found[b, len(objects) :].count_nonzero() == 0


def test_padding_of_objects_has_no_part_in_a_loss() -> None:
    layout = layout_by_hand()
    for objective in OBJECTIVES.values():
        maps = random_maps(kinds=kinds_of(objective))
        whole = objective(kept(objective, maps, layout), layout)
        for b, objects in enumerate(OBJECTS):
            count = len(objects)
            alone = Layout(
                {grid: mask[b : b + 1, :count] for grid, mask in layout.masks.items()},
                layout.token_weights[b : b + 1, :count],
                layout.words[b : b + 1],
                layout.weights[b : b + 1, :count],
                layout.relations[b : b + 1, :count, :count],
                layout.siblings[b : b + 1, :count, :count],
                layout.stretched[b : b + 1, :count],
            )
            own = {site: probs[b : b + 1] for site, probs in maps.items()}
            torch.testing.assert_close(
                objective(kept(objective, own, alone), alone), whole[b : b + 1], rtol=1e-12, atol=0
            )


# ---- gradients


@pytest.fixture(scope="module")
def unet() -> UNet:
    """The tiny UNet in float64, with keys large enough that attention is not flat."""
    torch.manual_seed(3)
    found = UNet(UNetConfig.from_dict(UNET)).double().requires_grad_(False)
    for site in found.sites:
        if site.kind == "cross":
            found.get_submodule(site.key).to_k.weight.mul_(6)
    return found


REGIONS = [
    [
        PlacedObject("a", (1, 2), ((0.1, 0.2, 0.55, 0.7),)),
        PlacedObject("b", (4,), ((0.4, 0.3, 0.9, 1.0),), weight=2.0),
    ],
    [PlacedObject("a", (3,), ((0.05, 0.1, 0.45, 0.65), (0.7, 0.5, 1.0, 1.0)), weight=1.5)],
]


def on_unet(
    unet: UNet, objective: Objective, h: int = 8, w: int = 12
) -> tuple[Objective, Record, Layout, Tensor, Tensor]:
    """The objective with its sites chosen, what it records, a layout, x and context of two images; all float64."""
    there = unet.positions(h, w)
    bound = objective.bound(there)
    grids = {at.grid for at in there.values()}
    made = make_layout(REGIONS, [7, 7], LENGTH, grids, relations=[RELATED[0][:1], []])
    layout = Layout({grid: mask.double() for grid, mask in made.masks.items()}, *(value.double() for value in made[1:]))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, h, w, generator=generator, dtype=torch.float64)
    context = torch.randn(2, LENGTH, 64, generator=generator, dtype=torch.float64)
    return bound, bound.record, layout, x, context


def slopes(loss: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, step: float = 1e-5) -> Tensor:
    """[B]: images are independent, so all are perturbed at once."""
    return (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "rnb"])
def test_the_gradient_equals_finite_differences(unet: UNet, name: str) -> None:
    bound, record, layout, x, context = on_unet(unet, OBJECTIVES[name])
    t = torch.tensor(700.0)

    def loss(x: Tensor) -> Tensor:
        return bound(unet(x, t, context, record, (), layout.inputs())[1], layout)

    gradient, (value, _, _) = evaluate(x, unet.forward, bound, record, (), t, context, layout, layout.inputs())
    torch.testing.assert_close(value, loss(x))
    steepest = gradient.abs().amax(dim=(1, 2, 3))
    assert steepest[0] > 1e-8 and (steepest[1] > 1e-8 or name in BETWEEN)  # the second image has one object
    for _ in range(2):
        direction = torch.randn_like(x)
        expected = slopes(loss, x, direction)
        torch.testing.assert_close((gradient * direction).sum(dim=(1, 2, 3)), expected, rtol=1e-5, atol=1e-10)


def frozen_rnb(at: Maps, layout: Layout) -> Callable[[Maps], Tensor]:
    """rnb_loss [B] with everything that its gradient ignores (the bright box, IoU, the map there, the scale of the
    sharp map, which terms are active) fixed at one point: a smooth function whose derivative is that gradient.
    """
    several = (layout.weights > 0).sum(dim=1) > 1

    def read(maps: Maps) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        found = {}
        for grid in {tuple(kept.shape[1:3]) for kept in maps.values()}:
            mean = sum(k for k in maps.values() if tuple(k.shape[1:3]) == grid)
            mean = mean / sum(tuple(k.shape[1:3]) == grid for k in maps.values())
            sharp = (120 * mean[..., 1:]).softmax(-1)
            raw = torch.einsum("bhwl,bol->bohw", mean, layout.token_weights)
            found[grid] = raw, torch.einsum("bhwl,bol->bohw", sharp, layout.token_weights[..., 1:])
        return found

    def normal(raw: Tensor) -> Tensor:
        low, high = raw.amin((2, 3), True), raw.amax((2, 3), True)
        return (raw - low) / (high - low + 1e-8)

    def threshold(found: Tensor, mask: Tensor) -> Tensor:
        inside = (mask * found).sum((2, 3), True) / mask.sum((2, 3), True).clamp_min(1e-8)
        outside = ((1 - mask) * found).sum((2, 3), True) / (1 - mask).sum((2, 3), True).clamp_min(1e-8)
        return 0.4 * inside + 0.6 * outside

    fixed = {}
    for grid, (raw, sharp) in read(at).items():
        mask, found = layout.masks[grid], normal(raw)
        lit = (found > threshold(found, mask)).tolist()
        bright = torch.tensor([[bounding(one) for one in some] for some in lit], dtype=torch.float64)
        iou = (bright * mask).sum((2, 3)) / torch.maximum(bright, mask).sum((2, 3)).clamp_min(1e-8)
        outside = (mask * raw).amax((2, 3)) < ((1 - mask) * raw).amax((2, 3))
        fixed[grid] = found, bright, iou, outside, sharp.amax((2, 3), True).clamp_min(1e-8)

    def value(maps: Maps) -> Tensor:
        losses = []
        for grid, (raw, sharp) in read(maps).items():
            mask, found = layout.masks[grid], normal(raw)
            before, bright, iou, outside, top = fixed[grid]
            change = found - before
            hard = (mask * (bright * mask + change)).sum((2, 3)) / (bright + change).sum((2, 3)).clamp_min(1e-8)
            soft = torch.sigmoid(20 * (found - threshold(found, mask)))
            loss = 2 - (1 - iou) * (hard + 0.5 * (mask * soft).sum((2, 3)) / soft.sum((2, 3)))
            edges = torch.stack(
                [steepness(sharp[b, o] / top[b, o]) for b in range(len(sharp)) for o in range(sharp.shape[1])]
            ).view_as(sharp)
            boundary = 1 - (1 - iou) * (mask * edges).sum((2, 3)) / edges.sum((2, 3))
            losses.append((iou < 0.85) * (loss + several[:, None] * outside * boundary))
        mean = sum(losses) / len(losses)
        return (layout.weights * mean).sum(1) / layout.weights.sum(1)

    return value


def steepness(line: Tensor) -> Tensor:
    """Sobel of the smoothed map [h,w]."""

    def at(maps: Tensor, i: int, j: int) -> Tensor:
        h, w = maps.shape
        rows = [mirrored(r + i, h) for r in range(h)]
        return maps[rows][:, [mirrored(c + j, w) for c in range(w)]]

    kernel = gaussian(3.0)
    smooth = sum(kernel[i + 1][j + 1] * at(line, i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))
    across = sum((2 - abs(i)) * (at(smooth, i, -1) - at(smooth, i, 1)) for i in (-1, 0, 1))
    down = sum((2 - abs(j)) * (at(smooth, -1, j) - at(smooth, 1, j)) for j in (-1, 0, 1))
    return (across**2 + down**2 + 1e-8).sqrt()


def test_the_gradient_of_rnb_equals_finite_differences_with_its_box_held(unet: UNet) -> None:
    bound, record, layout, x, context = on_unet(unet, minidiff.rnb_loss)
    t = torch.tensor(700.0)

    def maps(x: Tensor) -> Maps:
        return unet(x, t, context, record, (), layout.inputs())[1]

    surrogate = frozen_rnb(maps(x), layout)
    gradient, (value, _, _) = evaluate(x, unet.forward, bound, record, (), t, context, layout, layout.inputs())
    torch.testing.assert_close(value, surrogate(maps(x)), rtol=1e-10, atol=0)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 1e-6
    for _ in range(2):
        direction = torch.randn_like(x)
        expected = slopes(lambda x: surrogate(maps(x)), x, direction, 1e-6)
        torch.testing.assert_close((gradient * direction).sum(dim=(1, 2, 3)), expected, rtol=1e-4, atol=1e-9)


def test_each_image_has_its_own_gradient(unet: UNet) -> None:
    t = torch.tensor(700.0)
    for objective in OBJECTIVES.values():
        bound, record, layout, x, context = on_unet(unet, objective)
        together, _ = evaluate(x, unet.forward, bound, record, (), t, context, layout, layout.inputs())
        for b in range(2):
            one = torch.tensor([b])
            alone, _ = evaluate(
                x[one],
                unet.forward,
                bound,
                record,
                (),
                t,
                context[one],
                layout.images(one),
                layout.images(one).inputs(),
            )
            torch.testing.assert_close(together[one], alone, rtol=1e-8, atol=1e-12)


# ---- sums and products


def whole_gradient(objective: Objective, maps: Maps, layout: Layout) -> tuple[Tensor, dict[Site, Tensor]]:
    """The loss, and its gradient with respect to all probabilities, whatever the objective keeps of them."""
    leaves = {site: probs.clone().requires_grad_() for site, probs in maps.items()}
    value = objective(kept(objective, leaves, layout), layout)
    found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    return value.detach(), {
        site: torch.zeros_like(probs) if one is None else one
        for (site, probs), one in zip(maps.items(), found, strict=True)
    }


PAIRS = [("layout", "attend_and_excite"), ("boxdiff", "refocusing"), ("rnb", "layout"), ("layout", "layout")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_sums_and_products_are_linear_in_value_and_gradient(first: str, second: str) -> None:
    layout, maps = layout_by_hand(), random_maps(0.7)
    a, b = OBJECTIVES[first], OBJECTIVES[second]
    value, gradient = whole_gradient(2 * a + (0.25 * b) * 3, maps, layout)
    (value_a, gradient_a), (value_b, gradient_b) = (whole_gradient(one, maps, layout) for one in (a, b))
    torch.testing.assert_close(value, 2 * value_a + 0.75 * value_b, rtol=1e-10, atol=0)
    for site in maps:
        torch.testing.assert_close(
            gradient[site], 2 * gradient_a[site] + 0.75 * gradient_b[site], rtol=1e-7, atol=1e-12
        )


def test_a_sum_records_what_both_can_be_read_from() -> None:
    a, b, c = minidiff.layout_loss, minidiff.boxdiff_loss, minidiff.refocusing_loss
    assert (a + 2 * a).keep == a.keep == BOX_MASS
    assert (b + c).keep == HEAD_MEAN
    assert (a + b).keep == ALL
    assert columns.keep == ALL  # COLUMNS is computed from it
    there = {site: at for site, at in UNet(UNetConfig.from_dict(UNET)).positions(8, 12).items() if site.kind == "cross"}
    both = (a + b).bound(there)
    assert both.sites == a.bound(there).sites | b.bound(there).sites
    assert {site.place for site in a.bound(there).sites} == {"mid", "up"}
    assert {site.place for site in b.bound(there).sites} == {"down", "up"}
    chosen = (a + b).bound(there, minidiff.place("mid"))
    assert {site.name for site in chosen.sites} == {"mid.0.0.cross"}


def test_the_default_objective_records_each_site_once(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, record, layout, x, context = on_unet(unet, minidiff.inside_loss + minidiff.extent_loss)
    kinds = {site.name: keep for site, keep in record.kinds.items()}
    assert kinds == {"mid.0.0.cross": BOX_MASS, **{f"up.1.{n}.cross": ALL for n in range(3)}}
    calls: Counter[str] = Counter()
    keep, inputs = Keep.__call__, Layout.inputs
    monkeypatch.setattr(Keep, "__call__", lambda self, *given: calls.update([self.name]) or keep(self, *given))
    monkeypatch.setattr(Layout, "inputs", lambda self: calls.update(["inputs"]) or inputs(self))
    evaluate(x, unet.forward, bound, record, (), torch.tensor(700.0), context, layout, layout.inputs())
    assert calls == {"inputs": 1, "ALL": 3, "BOX_MASS": 4, "HEAD_MEAN": 3}


def test_a_sum_reads_each_terms_own_sites(unet: UNet) -> None:
    t = torch.tensor(700.0)
    parts = []
    for objective in (minidiff.layout_loss, minidiff.boxdiff_loss, minidiff.layout_loss + 0.5 * minidiff.boxdiff_loss):
        bound, record, layout, x, context = on_unet(unet, objective)
        parts.append(evaluate(x, unet.forward, bound, record, (), t, context, layout, layout.inputs()))
    (grad_a, (loss_a, objects_a, _)), (grad_b, (loss_b, objects_b, _)), (grad, (loss, objects, _)) = parts
    torch.testing.assert_close(loss, loss_a + 0.5 * loss_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(objects, objects_a + 0.5 * objects_b, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(grad, grad_a + 0.5 * grad_b, rtol=1e-7, atol=1e-12)


# ---- user-defined objectives


@minidiff.objective
def brightness(maps: Maps, layout: Layout) -> Tensor:
    """[B,O]"""
    (probs,) = maps.values()
    return torch.einsum("bhyxl,bol->bo", probs, layout.token_weights)


@minidiff.objective(sites=minidiff.cross & minidiff.place("mid"), keep=HEAD_MEAN)
def of_an_image(maps: Maps, layout: Layout) -> Tensor:
    """[B]"""
    (probs,) = maps.values()
    return probs.square().sum(dim=(1, 2, 3))


@minidiff.objective(keep=COLUMNS, reduce="sum")
def columns(maps: Maps, layout: Layout) -> Tensor:
    """[B,O]"""
    (found,) = maps.values()
    return found.sum(dim=(1, 2, 3))


def as_they_are(maps: Maps, layout: Layout) -> Tensor:
    (found,) = maps.values()
    return found


def test_your_own_function_is_an_objective() -> None:
    layout, maps = layout_by_hand(), random_maps()
    site = SITE
    probs = maps[site]
    expected = torch.zeros(3, dtype=torch.float64)
    for b, objects in enumerate(OBJECTS):
        losses = [weight * float(probs[b][..., list(tokens)].mean(-1).sum()) for _, tokens, weight in objects]
        expected[b] = sum(losses) / sum(weight for _, _, weight in objects)
    torch.testing.assert_close(brightness({site: probs}, layout), expected)
    image = of_an_image({site: probs.mean(1)}, layout)
    torch.testing.assert_close(image, torch.stack([probs[b].mean(0).square().sum() for b in range(3)]))
    total, objects, _ = (2 * of_an_image).look({site: probs.mean(1)}, layout, layout.inputs())
    torch.testing.assert_close(total, 2 * image)
    assert objects.abs().max() == 0  # a loss of the whole image belongs to no object
    # kept as ALL, read as COLUMNS; summed, not averaged
    assert float(columns({site: probs}, layout)[1]) == pytest.approx(1.5 * float(probs[1, ..., 3].sum()))
    assert [term.name for term in (brightness + columns).terms] == ["brightness", "columns"]


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_reductions_weigh_objects_and_leave_padding_out(reduce: str) -> None:
    weights = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = torch.tensor([[0.5, 0.3, 0.9], [-0.2, 1e6, 1e6], [1e6, -1e6, 7.0]])
    none = torch.zeros_like(weights)
    layout = Layout(
        {}, torch.zeros(3, 3, 4), torch.zeros(3, 4), weights, torch.zeros(3, 3, 3, 3), torch.zeros(3, 3, 3), none
    )
    made = minidiff.objective(reduce=reduce)(as_they_are)
    expected = {"mean": [(0.5 + 0.6 + 0.45) / 3.5, -0.2, 0], "sum": [1.55, -0.6, 0], "max": [0.6, -0.6, 0]}
    torch.testing.assert_close(made({SITE: loss}, layout), torch.tensor(expected[reduce]))


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_a_batch_without_any_object_has_no_loss(reduce: str) -> None:
    none = torch.zeros(2, 0)
    layout = Layout(
        {}, torch.zeros(2, 0, 4), torch.zeros(2, 4), none, torch.zeros(2, 0, 0, 3), torch.zeros(2, 0, 0), none
    )
    made = minidiff.objective(reduce=reduce)(as_they_are)
    assert torch.equal(made({SITE: torch.zeros(2, 0)}, layout), torch.zeros(2))


def test_objectives_are_values() -> None:
    a, b = minidiff.layout_loss, minidiff.boxdiff_loss
    assert a + 2 * b == a + b * 2
    assert hash(a + 2 * b) == hash(a + b * 2)
    assert a * 1.0 == a
    assert a * 2 != a
    assert a != b
    # Where holds a new function each time, but equality compares its text
    again = replace(
        a, terms=(replace(a.terms[0], sites=minidiff.cross & (minidiff.place("mid") | minidiff.block("up", 1))),)
    )
    assert again == a
    assert hash(again) == hash(a)
    assert (a + b).settings == a.settings
    assert (b + a).settings == b.settings
    with pytest.raises(AttributeError):
        a.settings = b.settings  # type: ignore[misc]


PLAIN = (
    *("attend_and_excite", "boxdiff", "bounded_attention", "initno", "refocusing", "rnb", "self_cross"),
    "self_refocusing",
)


def test_published_settings() -> None:
    """The papers' settings."""
    chosen = minidiff.layout_loss.settings
    assert (chosen.scale, chosen.threshold, chosen.iterations, chosen.steps, chosen.step_rule) == (
        30,
        0.2,
        5,
        10,
        "variance",
    )
    excite = minidiff.attend_and_excite_loss.settings
    assert excite.steps == 25
    assert excite.scale[0] == 20
    assert excite.scale[24] == pytest.approx(20 * math.sqrt(1 - 0.5 * 24 / 49))
    assert [excite.threshold[i] for i in (0, 1, 10, 20)] == [0.95, 0, 0.5, 0.2]
    assert [excite.iterations[i] for i in (0, 1, 10, 20, 24)] == [20, 1, 20, 20, 1]
    assert all(one.settings.step_rule == "plain" for name, one in OBJECTIVES.items() if name in PLAIN)


# ---- properties


HEADS = 2
WIDE = 14  # text tokens in the property tests: more than all objects own


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, int], list[PlacedObject], int]:
    """A grid, one image's regions, and a seed. Edges from a fine raster, so that all special cases occur."""
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    regions = []
    for o in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["any", "cell", "edge", "whole", "tiny"]))
        if kind == "cell":
            r, c = draw(st.integers(0, grid[0] - 1)), draw(st.integers(0, grid[1] - 1))
            box = (c / grid[1], r / grid[0], (c + 1) / grid[1], (r + 1) / grid[0])
        elif kind == "whole":
            box = (0.0, 0.0, 1.0, 1.0)
        elif kind == "tiny":
            x, y = draw(st.floats(0.01, 0.98)), draw(st.floats(0.01, 0.98))
            box = (x, y, x + 1e-3, y + 1e-3)
        else:
            x0, y0 = draw(st.floats(0, 0.8)), draw(st.floats(0, 0.8))
            far = st.floats(0.05, 0.19)
            box = (x0, y0, 1.0, 1.0) if kind == "edge" else (x0, y0, x0 + draw(far), y0 + draw(far))
        twice = draw(st.booleans())  # a phrase that occurs twice in the prompt owns two runs of tokens
        tokens = (o + 1, 9 + o % 4) if twice else (o + 1,)
        regions.append(PlacedObject(str(o), tokens, (box,), weight=draw(st.sampled_from([0.5, 1.0, 2.0]))))
    return grid, regions, draw(st.integers(0, 1000))


def can_move(name: str, mask: Tensor, maps: Maps, regions: list[PlacedObject], loss: float) -> bool:
    """Whether the loss can decrease by changing the maps.

    With a mask that is equal in all cells (the whole picture; a grid of one cell), the attention inside does not depend
    on its position: layout_loss, inside_loss and rnb_loss are constant. rnb_loss is zero by definition where the boxes
    agree.
    """
    uneven = mask.flatten(1).amax(1) - mask.flatten(1).amin(1) > 1e-9
    if name in ("layout", "inside"):
        return bool(uneven.any())
    if name == "relation":  # one column has one x
        return loss > 1e-6 and mask.shape[2] > 1
    if name == "extent":  # one cell has one centre and one size
        return mask[0].numel() > 1
    if name in ("conform", "self_refocusing", "winwinlay", "bounded_attention"):  # one cell has all attention
        return loss > 1e-6 and mask[0].numel() > 1
    if name == "rnb":
        objects: Objects = [(list(region.boxes), region.tokens, region.weight) for region in regions]
        parts = slow_rnb_parts({site: probs.detach()[0] for site, probs in maps.items()}, objects)
        return any(bool(free) and on_grid[0][0] < 0.849 for free, (_, on_grid) in zip(uneven, parts, strict=True))
    return loss > 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=layouts())
def test_loss_and_gradient_are_finite_and_move_what_can_be_moved(
    name: str, case: tuple[tuple[int, int], list[PlacedObject], int]
) -> None:
    grid, regions, seed = case
    related = [[Relation("0", "left of", "1")]]
    made = make_layout([regions], [WIDE - 2], WIDE, [grid], relations=related)
    layout = Layout({grid: made.masks[grid].double()}, *(value.double() for value in made[1:]))
    generator = torch.Generator().manual_seed(seed)
    objective = OBJECTIVES[name]
    logits = {
        replace(SITE, kind=kind): torch.randn(
            *(1, HEADS, *grid, WIDE if kind == "cross" else math.prod(grid)), generator=generator, dtype=torch.float64
        ).requires_grad_()
        for kind in kinds_of(objective)
    }
    probs = {site: one.softmax(-1) for site, one in logits.items()}
    loss = objective(kept(objective, probs, layout), layout)
    gradients = torch.autograd.grad(loss.sum(), list(logits.values()))
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if can_move(name, layout.masks[grid][0], probs, regions, loss.item()):
        assert max(gradient.abs().max() for gradient in gradients) > 0


def test_two_small_maps_are_not_one_large_one() -> None:
    """All are centred, and within an eighth as widely spread as the box asks for."""
    layout = make_layout([[PlacedObject("a", (1,), ((0.1, 0.1, 0.9, 0.9),))]], [1], 2, [(20, 20)])
    one, two = torch.full((2, 20, 20), 1e-9)
    one[5:15, 5:15] = two[5:9, 5:9] = two[11:15, 11:15] = 1
    losses = [
        minidiff.extent_loss({SITE: torch.stack([some, some], dim=2)[None]}, layout).item() for some in (one, two)
    ]
    assert losses[0] < 0.01 and losses[1] > 1


def test_nothing_is_to_be_won_where_the_box_is_the_whole_picture() -> None:
    grid = (3, 5)
    layout = make_layout([[PlacedObject("a", (1,), ((0, 0, 1, 1),))]], [5], LENGTH, [grid])
    probs = torch.rand(1, 2, *grid, LENGTH).softmax(-1)
    mass = BOX_MASS(SITE, probs, layout.inputs())
    found = minidiff.layout_loss({SITE: mass}, layout)
    assert found.abs().max() <= 1e-12


def test_a_box_at_the_edge_and_a_full_one_are_finite_in_float32() -> None:
    """In float32, as guidance runs; with a full mask, one of a single cell, and one below cell size."""
    regions = [
        PlacedObject("a", (1,), ((0, 0, 1, 1),)),
        PlacedObject("b", (2,), ((0.75, 0.5, 1, 1),)),
        PlacedObject("c", (3,), ((0.999, 0.999, 1, 1),)),
    ]
    for grid in ((1, 1), (1, 4), (2, 4), (8, 8)):
        layout = make_layout([regions], [7], LENGTH, [grid])
        shapes = {"cross": (1, 2, *grid, LENGTH), "self": (1, 2, *grid, math.prod(grid))}
        logits = {kind: (4 * torch.randn(shape)).requires_grad_() for kind, shape in shapes.items()}
        for objective in OBJECTIVES.values():
            some = {replace(SITE, kind=kind): logits[kind].softmax(-1) for kind in kinds_of(objective)}
            loss = objective(kept(objective, some, layout), layout)
            gradients = torch.autograd.grad(loss.sum(), [logits[kind] for kind in kinds_of(objective)])
            assert loss.isfinite().all()
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_masks_have_a_name_for_each_grid() -> None:
    layout = layout_by_hand()
    inputs: Inputs = layout.inputs()
    for grid, mask in layout.masks.items():
        assert inputs[mask_name(grid)] is mask


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("layout", "self", "sites hold self-attention, but .* reads cross-attention"),
        (
            "self_cross",
            "cross",
            "sites hold cross-attention, but .* reads cross and self-attention; expected such sites. An objective",
        ),
        ("self_refocusing", "cross", "sites hold cross-attention, but .* reads self-attention"),
    ],
)
def test_sites_of_another_kind_are_refused(name: str, kind: str, message: str) -> None:
    there = UNet(UNetConfig.from_dict(UNET)).positions(8, 8)
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name].bound(there, [site for site in there if site.kind == kind])
