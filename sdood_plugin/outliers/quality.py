"""What an outlier set is like: did the class flip, did the nuisance stay, is it a copy, do copies of a source differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..config import KINDS, SelectionConfig
from ..data.images import to_unit
from .select import Verdicts, kinds

NEAR_DUPLICATE = 0.02  # root mean square difference in [-1, 1] units: two and a half grey levels
_PART = 4096  # images computed with at once
_GROUPS = 8  # a range of S or w is reported in this many parts


def set_quality(
    images: torch.Tensor,
    sources: torch.Tensor,
    train: torch.Tensor,
    verdicts: Verdicts,
    settings: Mapping[str, Sequence[Hashable]],
    selection: SelectionConfig,
) -> dict[str, Any]:
    """Figures of an outlier or control set, per cent where they are rates.

    Args:
        images: uint8 (N, 3, H, W).
        sources: int64 (N,), positions of the sources in `train`.
        train: uint8 (M, 3, H, W).
        verdicts: What the reference classifier and the training images say of each.
        settings: N values each of `target`, `start_fraction`, `guidance_weight`: what the set is broken down by.
        selection: From which confidence on a class counts as flipped, and what is a duplicate.

    Returns:
        `count`; the means of `image_figures`; `border_correlation_random` and `low_frequency_correlation_random` between
        outliers and the source of another one; `diversity_within_source`, the root mean square distance between outliers
        of one source (null where each source has one), beside `diversity_between_sources`; and the means again
        `by_class_pair`, `by_start_fraction` and `by_guidance_weight`. A class pair is (source's label, `target`), or, where
        guidance pointed to no class, (source's label, class `predicted` in the outlier).
    """
    own, other = train[sources], train[other_sources(sources)]
    figures = image_figures(images, own, verdicts, selection)
    targets = settings["target"]
    seen, aimed = verdicts.predicted.tolist(), all(str(target) for target in targets)
    pairs = list(zip(verdicts.labels.tolist(), targets if aimed else seen, strict=True))
    if aimed:
        reached = torch.tensor([str(found) == str(target) for found, target in zip(seen, targets, strict=True)])
        figures["target_rate"] = 100.0 * reached.double()
    within, between = diversity(torch.cat([small(part) for part in images.split(_PART)]), sources)
    return {
        "count": len(images),
        **{name: float(values.mean()) for name, values in figures.items()},
        "border_correlation_random": float(in_parts(border_correlation, images, other).mean()),
        "low_frequency_correlation_random": float(in_parts(low_frequency_correlation, images, other).mean()),
        "diversity_within_source": within,
        "diversity_between_sources": between,
        "by_class_pair": breakdown(pairs, ("source_label", "target" if aimed else "predicted"), figures),
        **{
            f"by_{name}": breakdown([(value,) for value in grouped([float(str(v)) for v in settings[name]])], (name,), figures)
            for name in ("start_fraction", "guidance_weight")
        },
    }


def image_figures(
    images: torch.Tensor, own: torch.Tensor, verdicts: Verdicts, selection: SelectionConfig
) -> dict[str, torch.Tensor]:
    """Figures of every outlier: float64 (N,) each.

    Returns:
        `stay_rate`, `flip_rate`, `ambiguous_rate`, `near_duplicate_rate` (0 or 100); `distance_to_source` (root mean square
        pixel difference, [-1, 1] units); `border_correlation` and `low_frequency_correlation` with the source: the nuisance
        that should stay.
    """
    found = kinds(verdicts, selection.flip_confidence)
    near = verdicts.nearest < (selection.duplicate_distance or NEAR_DUPLICATE)
    return {
        **{f"{name}_rate": 100.0 * (found == number).double() for number, name in enumerate(KINDS)},
        "near_duplicate_rate": 100.0 * near.double(),
        "distance_to_source": in_parts(pixel_distance, images, own),
        "border_correlation": in_parts(border_correlation, images, own),
        "low_frequency_correlation": in_parts(low_frequency_correlation, images, own),
    }


def in_parts(
    figure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], first: torch.Tensor, second: torch.Tensor, size: int = _PART
) -> torch.Tensor:
    """A figure of pairs of images, `size` pairs at once: float64 (N,)."""
    pairs = zip(first.split(size), second.split(size), strict=True)
    return torch.cat([figure(to_unit(a), to_unit(b)).double().cpu() for a, b in pairs])


def other_sources(sources: torch.Tensor) -> torch.Tensor:
    """int64 (N,): for each outlier another source, the next in a random cycle of all of them (of one, itself)."""
    distinct, position = sources.unique(return_inverse=True)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0))
    following = torch.empty_like(distinct)
    following[order] = distinct[order.roll(-1)]
    return following[position]


def small(images: torch.Tensor) -> torch.Tensor:
    """float (N, D) pixels in [-1, 1], averaged down to 16 px at most."""
    values = to_unit(images)
    return (F.adaptive_avg_pool2d(values, 16) if images.shape[-1] > 16 else values).flatten(1)


def pixel_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float (N,): root mean square difference of float (N, 3, H, W) images."""
    return (first - second).square().mean(dim=(1, 2, 3)).sqrt()


def border_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float (N,): correlation of the images' outer ring (an eighth of the side on each edge), smoothed by a 3 x 3 mean."""
    side, ring = first.shape[-1], max(1, first.shape[-1] // 8)
    mask = torch.ones(side, side, dtype=torch.bool, device=first.device)
    mask[ring:-ring, ring:-ring] = False
    smooth = [F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False) for images in (first, second)]
    return _correlation(*(images[:, :, mask].flatten(1) for images in smooth))


def low_frequency_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float (N,): correlation of the images averaged down to 4 x 4."""
    return _correlation(*(F.adaptive_avg_pool2d(images, 4).flatten(1) for images in (first, second)))


def _correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float (N,): Pearson's, row by row; 0 where a row is constant."""
    a, b = (F.normalize(values - values.mean(dim=1, keepdim=True), dim=1, eps=1e-4) for values in (first, second))
    return (a * b).sum(dim=1)


def diversity(values: torch.Tensor, group: torch.Tensor) -> tuple[float | None, float | None]:
    """Root mean square distance over all pairs of rows of one group, and over all pairs of different groups.

    The sum over the pairs of m rows is m times the sum of squared distances to their mean.

    Args:
        values: float (N, D).
        group: int64 (N,).

    Returns:
        The two distances, divided by sqrt(D); None where there is no such pair.
    """

    def pairs(index: torch.Tensor) -> tuple[float, float]:
        counts = torch.bincount(index)
        means = values.new_zeros(len(counts), values.shape[1]).index_add_(0, index, values) / counts[:, None]
        parts = zip(values.split(_PART), index.split(_PART), strict=True)
        squares = torch.cat([(part - means[i]).square().mean(dim=1) for part, i in parts]).double() * counts[index]
        return float(squares.sum()), float((counts * (counts - 1)).sum()) / 2

    within, n_within = pairs(group.unique(return_inverse=True)[1])
    every, n_every = pairs(torch.zeros_like(group))
    return (
        (within / n_within) ** 0.5 if n_within else None,
        (max(every - within, 0.0) / (n_every - n_within)) ** 0.5 if n_every > n_within else None,
    )


def grouped(values: Sequence[float], most: int = _GROUPS) -> list[str]:
    """A name for the group each value falls in: the value itself, or one of `most` equally filled ranges of many values."""
    distinct = sorted(set(values))
    if len(distinct) <= most:
        return [f"{value:g}" for value in values]
    edges = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.linspace(0, 1, most + 1, dtype=torch.float64))
    place = torch.searchsorted(edges[1:-1].contiguous(), torch.tensor(values, dtype=torch.float64), right=True)
    return [f"{edges[i]:.3g} to {edges[i + 1]:.3g}" for i in place.tolist()]


def breakdown(
    keys: Sequence[tuple[Hashable, ...]], names: tuple[str, ...], figures: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """The means of per-image figures over the images of each key, in order of the keys, with their `count`."""
    order = {key: number for number, key in enumerate(sorted(set(keys), key=_natural))}
    group = torch.tensor([order[key] for key in keys], dtype=torch.int64)
    counts = torch.bincount(group, minlength=len(order))
    means = {name: (torch.bincount(group, weights=values) / counts).tolist() for name, values in figures.items()}
    return [
        {**dict(zip(names, key, strict=True)), "count": int(counts[row]), **{name: means[name][row] for name in means}}
        for key, row in order.items()
    ]


def _natural(key: tuple[Hashable, ...]) -> list[tuple[float, str]]:
    """Numbers, and names that begin with one, by value."""
    words = [str(part).split(" ")[0] for part in key]
    return [(float(word), "") if word.replace(".", "", 1).lstrip("-").isdigit() else (float("inf"), word) for word in words]
