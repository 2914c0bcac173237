"""What the rows of all seeds of sampling_speed say together: which setting is chosen, and what each saving gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from benchmarks.record import mean_and_deviation

Rows = Sequence[dict[str, Any]]
FLIP_POINTS, DISTANCE_SHARE = 2.0, 0.05
SETTING = re.compile(r"ours: (?P<how>\w+, \d+ steps), w = [^,]+(?P<interval>, guided from [^,]+)?(?P<compiled>, compiled)?")


def is_equal(flips_above: float, distance_above: float) -> bool:
    """Whether flip rates differ by 2 points at most, and Frechet distances, a share of the baseline's, by 5 %."""
    return abs(flips_above) <= FLIP_POINTS and abs(distance_above) <= DISTANCE_SHARE


def choose(rows: Rows) -> list[dict[str, Any]]:
    """The rows with the column `chosen`: one of our settings a baseline, the same in every seed."""
    best = {baseline: fastest_equal(rows, baseline) for baseline in {row["baseline"] for row in rows}}
    return [{**row, "chosen": row["method"] == best[row["baseline"]]} for row in rows]


def fastest_equal(
    rows: Rows, baseline: str, fits: Callable[[str], bool] = lambda method: method.startswith("ours")
) -> str | None:
    """The method with the highest mean ratio of those that are equal to the baseline in the mean of all choosing halves.

    Args:
        rows: Of all seeds.
        baseline: What the method is beside.
        fits: Which methods are asked for.

    Returns:
        Its name; None where no method that has every seed is equal.
    """
    beside = [row for row in rows if row["baseline"] == baseline]
    seeds, ratios = {row["seed"] for row in beside}, {}
    for method in dict.fromkeys(row["method"] for row in beside if fits(row["method"])):
        own = [row for row in beside if row["method"] == method]
        flips, distance, ratio = (
            fmean(row[f"choosing_{name}"] for row in own) for name in ("flips_above", "fd_above_percent", "ratio")
        )
        if len(own) == len(seeds) and is_equal(flips, distance / 100):
            ratios[method] = ratio
    return max(ratios, key=lambda method: ratios[method], default=None)


def chosen(rows: Rows) -> list[dict[str, Any]]:
    """By baseline the chosen setting: its ratio on the reported halves, how it differs there, and on how many it is equal."""
    found = []
    for baseline in dict.fromkeys(row["baseline"] for row in rows):
        own = [row for row in rows if row["baseline"] == baseline and row["chosen"]]
        if not own:
            found.append({"baseline": baseline, "method": "none is equal"})
            continue
        ratio, deviation = mean_and_deviation([row["ratio"] for row in own])
        equal = f"{sum(row['equal'] for row in own)} of {len(own)}"
        record = {"baseline": baseline, "method": own[0]["method"], "ratio": ratio, "ratio_std": deviation, "equal": equal}
        found.append(record | {name: fmean(row[name] for row in own) for name in ("flips_above", "fd_above_percent")})
    return found


def savings(rows: Rows) -> list[dict[str, Any]]:
    """How many times as fast each saving alone makes sampling on the reported halves, or why that is not known.

    `steps` is the fastest setting without interval or compilation that equals `informed`, beside it; `interval` and
    `compile` compare settings that differ in nothing else but, for the interval, perhaps w, which costs no time.
    """
    speeds = {(row["seed"], row["method"]): row["images_per_s"] for row in rows}
    fewer = fastest_equal(
        rows, "informed", lambda method: bool(found := SETTING.fullmatch(method)) and not any(found.groups()[1:])
    )
    cells = {
        "steps": (_ratios(speeds, "informed", fewer), f"{fewer}, beside informed", "no setting without an interval is equal"),
        "batched forward": (_ratios(speeds, "naive", "naive, batched forward"), "naive", "not measured"),
        "interval": (*_paired(speeds, "interval"), "not measured: no setting with and without"),
        "precision": (_ratios(speeds, "informed, float32", "informed"), "informed", "not applicable: float32"),
        "compile": (*_paired(speeds, "compiled"), "not measured: no --compile"),
    }
    return [{"saving": name, **_said(*cell)} for name, cell in cells.items()]


def _said(ratios: list[float], where: str, otherwise: str) -> dict[str, Any]:
    if not ratios:
        return {"said": otherwise}
    mean, deviation = mean_and_deviation(ratios)
    return {"ratio": mean, "ratio_std": deviation, "where": where}


def _ratios(speeds: dict[tuple[int, str], float], slow: str, fast: str | None) -> list[float]:
    """By seed, how many times as fast one method is."""
    return [
        speeds[seed, fast or ""] / speed for (seed, method), speed in speeds.items() if method == slow and (seed, fast) in speeds
    ]


def _paired(speeds: dict[tuple[int, str], float], part: str) -> tuple[list[float], str]:
    """By seed, the mean ratio over settings with and without a part of the name; and these settings."""
    groups: dict[tuple[int, str], dict[bool, list[float]]] = {}
    for (seed, method), speed in speeds.items():
        if found := SETTING.fullmatch(method):
            rest = found["how"] if part == "interval" else method.removesuffix(found["compiled"] or "")
            if part == "compiled" or not found["compiled"]:
                groups.setdefault((seed, rest), {}).setdefault(bool(found[part]), []).append(speed)
    whole = {key: fmean(group[True]) / fmean(group[False]) for key, group in groups.items() if len(group) == 2}
    by_seed = [fmean(ratio for (own, _), ratio in whole.items() if own == seed) for seed in sorted({seed for seed, _ in whole})]
    names = list(dict.fromkeys(rest for _, rest in whole))
    return by_seed, names[0] if len(names) == 1 else f"{len(names)} settings"
