"""The distance + voting score (METHOD section 5), larger = more OOD."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from ..config import ScoringConfig
from ..errors import RunError, UsageError
from ..metrics import auroc_standard_error, detection_metrics
from ..neighbours import Bank
from .reduction import reduce_banks
from .terms import Terms, distance_and_votes, terms_by_class
from .threshold import Threshold, choose_threshold, p_values

log = logging.getLogger(__name__)
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a feature, as a share of its norm: two passes over one image may differ so


@dataclass(frozen=True)
class Calibration:
    """What held-out data decided; no test image has a part in it.

    Attributes:
        distance_scale: Median distance term of held-out ID images, which the distance is divided by.
        alpha: Weight of the votes.
        curve: AUROC of held-out outliers, without outliers of their class in the bank, against held-out images and controls
            for each candidate alpha, as [alpha, per cent] pairs.
        votes: Mean votes of the held-out `ID`, `controls`, `outliers` and, without their own class in the bank, `outliers of
            other classes`, as far as they are there.
        heldout: Numbers of held-out ID images, outliers and controls.
        reduction: What smaller banks cost: AUROC, per cent, of held-out outliers against held-out images under the `whole` banks
            and under the `reduced` ones; empty without held-out outliers and where the banks are whole.
    """

    distance_scale: float
    alpha: float
    curve: list[list[float]]
    votes: dict[str, float]
    heldout: list[int]
    reduction: dict[str, float]


@dataclass(frozen=True)
class Score:
    """A fitted score: banks, settings and calibration.

    Attributes:
        inside: float (N, D), in-distribution bank, normalised if the settings say so.
        outliers: float (M, D), outlier bank, may be empty.
        config: The settings.
        calibration: What held-out data decided.
        heldout: The terms of the P held-out ID images, on the CPU.
    """

    inside: torch.Tensor
    outliers: torch.Tensor
    config: ScoringConfig
    calibration: Calibration
    heldout: Terms

    @cached_property
    def _banks(self) -> tuple[Bank, Bank | None]:
        return _banks(self.inside, self.outliers, self.config)

    @cached_property
    def threshold(self) -> Threshold:
        """The threshold at the rate that the settings ask for."""
        return self.threshold_at(self.config.false_alarm_rate)

    def terms(self, features: torch.Tensor) -> Terms:
        """(distance / its held-out median, votes) of float (B, D) features, as `Terms`."""
        return _terms(_prepare(features, self.config.normalise), self._banks, self.config).over(self.calibration.distance_scale)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """The score, float64 (B,) (float32 on Apple GPUs), of float (B, D) features; larger = more OOD."""
        return self.combined(*self.terms(features))

    def combined(self, distance: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
        """The score, (B,), of its terms."""
        return distance + self.calibration.alpha * votes

    def with_alpha(self, alpha: float) -> Score:
        """The same banks, scale and held-out images under another weight of the votes.

        Raises:
            UsageError: It is below 0.
        """
        return replace(self, config=replace(self.config, alpha=alpha), calibration=replace(self.calibration, alpha=alpha))

    def threshold_at(self, false_alarm_rate: float) -> Threshold:
        """The threshold at another rate than that of the settings."""
        return choose_threshold(self.combined(*self.heldout), false_alarm_rate)

    def p_values(self, scores: torch.Tensor) -> torch.Tensor:
        """Conformal p-values, float64 (B,), of scores float (B,)."""
        return p_values(scores, self.combined(*self.heldout))


def _prepare(features: torch.Tensor, normalise: bool) -> torch.Tensor:
    """float32 (B, D): the features, or their directions, whatever finite size they have; rows of zeros stay zeros."""
    if not normalise:
        return features.float()
    wide = features if features.dtype == torch.float64 else features.float()
    largest = torch.linalg.vector_norm(wide, ord=torch.inf, dim=1, keepdim=True)
    ordinary = (largest > 1e-10) & (largest < 1e15)  # float32 holds their squares: these rows stay what they are
    return F.normalize((wide / torch.where(ordinary | (largest == 0), 1.0, largest)).float(), dim=1)


def _banks(inside: torch.Tensor, outliers: torch.Tensor, config: ScoringConfig) -> tuple[Bank, Bank | None]:
    return Bank(inside, backend=config.backend), Bank(outliers, backend=config.backend) if len(outliers) else None


def _terms(features: torch.Tensor, banks: tuple[Bank, Bank | None], config: ScoringConfig) -> Terms:
    return distance_and_votes(features, *banks, config.k_distance, config.k_vote)


def fit_score(
    inside: torch.Tensor,
    outliers: torch.Tensor,
    heldout_inside: torch.Tensor,
    heldout_outliers: torch.Tensor,
    config: ScoringConfig,
    *,
    outlier_classes: torch.Tensor | None = None,
    heldout_classes: torch.Tensor | None = None,
    heldout_controls: torch.Tensor | None = None,
) -> Score:
    """Build the banks and choose alpha, the distance's scale and the threshold on held-out data.

    alpha is to be right for outliers of other kinds than those at hand, which come from one generator and which the network
    was trained against. So it is chosen on held-out outliers that find no outlier of their own class in the bank (what
    Meredig et al. 2018 do with clusters to measure extrapolation), and against held-out images and controls together: a
    control is as generated as an outlier, so that votes for being generated count for nothing. It is the smallest candidate
    whose AUROC is within one standard error of the best one's (the rule of Breiman et al. 1984 for the simplest model), which
    is taken at half a misplaced image where the best is nearer to 100.

    Args:
        inside: float (N, D) features of in-distribution training images.
        outliers: float (M, D) features of outliers made of them; M may be 0.
        heldout_inside: float (P, D), images no training has seen, P > 0.
        heldout_outliers: float (Q, D), outliers made of those; Q may be 0, then alpha is 0 unless it is set.
        config: The settings.
        outlier_classes: int64 (M,), the class each outlier was made of. None is left out where there is one class alone, one
            is not known (below 0), or these are None.
        heldout_classes: int64 (Q,), the same of the held-out ones.
        heldout_controls: float (R, D), same-class controls made of the held-out images.

    Raises:
        UsageError: Features that are not finite, no held-out images, classes of another number, or a k larger than its bank.
        RunError: Half of the held-out images are in the bank, or as near to it as rounding is.
    """
    controls = heldout_inside[:0] if heldout_controls is None else heldout_controls
    if not len(heldout_inside):
        raise UsageError("held-out in-distribution features", "none", "one or more", "hold out images that no training sees")
    classes = _known_classes((outlier_classes, heldout_classes), (outliers, heldout_outliers))
    names = ("in-distribution", "outlier", "held-out in-distribution", "held-out outlier", "held-out control")
    given = zip(names, (inside, outliers, heldout_inside, heldout_outliers, controls), strict=True)
    inside, outliers, heldout_inside, heldout_outliers, controls = (
        _finite(_prepare(features, config.normalise), name) for name, features in given
    )
    whole = _banks(inside, outliers, config)
    near = _terms(heldout_inside, whole, config)
    scale = _scale(near, heldout_inside, config)
    found = {"ID": near, "controls": _terms(controls, whole, config)}
    if classes is None:
        found["outliers"] = far = _terms(heldout_outliers if len(outliers) else heldout_outliers[:0], whole, config)
    else:
        k = config.k_distance, config.k_vote
        found["outliers"], far = terms_by_class(heldout_outliers, classes[1], whole[0], outliers, classes[0], *k, config.backend)
        found["outliers of other classes"] = far
    alpha, curve = _choose_alpha([near.over(scale), found["controls"].over(scale)], far.over(scale), config)
    first = inside, outliers
    inside, outliers = (  # centres lie within the unit sphere; what is normalised already would move by its rounding
        bank if bank is whole_bank else _prepare(bank, config.normalise)
        for bank, whole_bank in zip(reduce_banks(first, config.bank_size, config.k_distance), first, strict=True)
    )
    reduction = {}
    if inside is not first[0] or outliers is not first[1]:
        sides = {"whole": (near.over(scale), found["outliers"].over(scale))}
        small = _banks(inside, outliers, config)
        near = _terms(heldout_inside, small, config)
        scale = _scale(near, heldout_inside, config)
        if len(found["outliers"].votes):
            sides["reduced"] = near.over(scale), _terms(heldout_outliers, small, config).over(scale)
            reduction = {name: _auroc([id_terms], ood_terms, alpha) for name, (id_terms, ood_terms) in sides.items()}
            said = "banks reduced to %d rows: AUROC of held-out outliers %.2f, with the whole banks %.2f"
            log.info(said, len(inside) + len(outliers), reduction["reduced"], reduction["whole"])
    votes = {name: float(terms.votes.mean()) for name, terms in found.items() if len(terms.votes)}
    _warn_of_votes(votes, config.k_vote)
    counts = [len(heldout_inside), len(heldout_outliers), len(controls)]
    heldout = Terms(*(term.cpu() for term in near.over(scale)))
    return Score(inside, outliers, config, Calibration(scale, alpha, curve, votes, counts, reduction), heldout)


def _scale(near: Terms, heldout: torch.Tensor, config: ScoringConfig) -> float:
    """The median distance of held-out images.

    Raises:
        RunError: It is no larger than rounding makes it.
    """
    scale, least = float(near.distance.median()), _rounding_distance(heldout, config)
    if scale <= least:
        raise RunError(
            "median distance of held-out images",
            scale,
            f"above {least:.2g}, which rounding alone makes",
            "remove duplicate images or train a backbone that tells images apart",
        )
    return scale


def _rounding_distance(features: torch.Tensor, config: ScoringConfig) -> float:
    """The distance term that rounding alone gives images that are in the bank."""
    norms = features.cpu().double().square().sum(dim=1)
    return config.k_distance * _ROUNDING**2 * float(norms.median())


def _finite(features: torch.Tensor, name: str) -> torch.Tensor:
    broken = (~torch.isfinite(features).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        expected = "finite numbers"
        raise UsageError(f"{name} features", f"NaN or infinity in row {broken[0]}", expected, "check that image and the backbone")
    return features


def _known_classes(
    classes: tuple[torch.Tensor | None, torch.Tensor | None], outliers: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The classes of the outliers and of the held-out ones, where all are known and there are several.

    Raises:
        UsageError: They are of another number than the outliers, or of one of the two sets alone.
    """
    bank, heldout = classes
    for name, given, features in zip(("outlier_classes", "heldout_classes"), classes, outliers, strict=True):
        if (bank is None) != (heldout is None) or (given is not None and len(given) != len(features)):
            count = "none" if given is None else f"{len(given)} classes"
            raise UsageError(name, count, f"{len(features)}, one an outlier, or none of either set", "give both sets'")
    if bank is None or heldout is None or len(bank.unique()) < 2 or int(torch.cat([bank, heldout]).min()) < 0:
        return None
    return bank, heldout


def _choose_alpha(inside: list[Terms], outside: Terms, config: ScoringConfig) -> tuple[float, list[list[float]]]:
    """alpha, and the AUROC at every candidate; without held-out outliers alpha is 0 unless it is set.

    Args:
        inside: The terms of what counts as in-distribution: held-out images and controls.
        outside: Those of held-out outliers.
        config: The settings.
    """
    if not len(outside.votes):
        return config.alpha or 0.0, []
    curve: list[list[float]] = []
    for candidate in sorted(config.alphas) if config.alpha is None else [config.alpha]:
        curve.append([candidate, _auroc(inside, outside, candidate)])
    best = max(auroc for _, auroc in curve)
    counts = sum(len(one.votes) for one in inside), len(outside.votes)
    allowed = best - auroc_standard_error(min(best, 100 - 50 / min(counts)), *counts)  # half an image is never known to be right
    return next(candidate for candidate, auroc in curve if auroc >= allowed), curve


def _auroc(inside: list[Terms], outside: Terms, alpha: float) -> float:
    """AUROC, per cent, of the terms' scores under an alpha."""
    sides = (torch.cat([one.distance + alpha * one.votes for one in side]).cpu() for side in (inside, [outside]))
    return detection_metrics(*sides)["auroc"]


def _warn_of_votes(votes: dict[str, float], k_vote: int) -> None:
    """Say so where controls, which show what their sources show, get votes as outliers do."""
    if {"controls", "outliers"} <= votes.keys() and votes["controls"] > votes["outliers"] / 2:
        log.warning(
            "of %d votes held-out controls get %.1f, held-out outliers %.1f, images %.1f: the votes tell what is generated from "
            "what is real, and not what it shows. Train the detector longer, with controls, or from pre-trained weights",
            k_vote,
            *(votes[name] for name in ("controls", "outliers", "ID")),
        )
