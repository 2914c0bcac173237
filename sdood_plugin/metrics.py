"""Detection and clustering metrics, all in per cent; scores are larger = more OOD."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .errors import UsageError


def detection_metrics(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, float]:
    """AUROC, AUPR and FPR@95 of separating OOD from ID.

    Args:
        id_scores: (N,) scores of in-distribution images, larger = more OOD.
        ood_scores: (M,) scores of OOD images.

    Returns:
        Per cent. `auroc`; `aupr` with OOD as the positive class and `aupr_id` with ID as the positive class;
        `fpr95`, the share of OOD images accepted at the threshold that accepts 95 % of ID (ID positive, the
        convention of most papers, Hendrycks & Gimpel 2017); `fpr95_ood_positive`, the share of ID images rejected
        at the threshold that rejects 95 % of OOD (OpenOOD's convention).

    Raises:
        UsageError: No scores on one side, or scores that are not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    inside, outside = np.asarray(id_scores, dtype=np.float64), np.asarray(ood_scores, dtype=np.float64)
    for name, scores in (("ID", inside), ("OOD", outside)):
        if scores.size == 0 or not np.isfinite(scores).all():
            raise UsageError(
                f"{name} scores", "none" if scores.size == 0 else "NaN or infinity", "finite scores", "check the test set"
            )
    is_ood = np.concatenate([np.zeros(inside.size), np.ones(outside.size)])
    scores = np.concatenate([inside, outside])
    values = {
        "auroc": roc_auc_score(is_ood, scores),
        "aupr": average_precision_score(is_ood, scores),
        "aupr_id": average_precision_score(1 - is_ood, -scores),
        "fpr95": false_positive_rate(1 - is_ood, -scores),
        "fpr95_ood_positive": false_positive_rate(is_ood, scores),
    }
    return {name: 100.0 * float(value) for name, value in values.items()}


def false_positive_rate(is_positive: np.ndarray, scores: np.ndarray, recall: float = 0.95) -> float:
    """The false positive rate at the highest threshold whose true positive rate is at least `recall`."""
    from sklearn.metrics import roc_curve

    false_positives, true_positives, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return float(false_positives[np.searchsorted(true_positives, recall)])


def auroc_standard_error(auroc: float, n_id: int, n_ood: int) -> float:
    """Standard error of an AUROC, both in per cent (Hanley & McNeil, Radiology 1982, with their exponential model)."""
    area = auroc / 100.0
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (n_ood - 1) * (q1 - area**2) + (n_id - 1) * (q2 - area**2)) / (n_id * n_ood)
    return 100.0 * float(np.sqrt(max(variance, 0.0)))


def auroc_interval(auroc: float, n_id: int, n_ood: int, level: float = 0.95) -> tuple[float, float]:
    """A normal confidence interval of an AUROC in per cent, from `auroc_standard_error`, cut at 0 and 100."""
    from scipy.stats import norm

    margin = float(norm.ppf(0.5 + level / 2)) * auroc_standard_error(auroc, n_id, n_ood)
    return max(0.0, auroc - margin), min(100.0, auroc + margin)


def clustering_metrics(predicted: ArrayLike, true: ArrayLike) -> dict[str, float]:
    """ACC (best one-to-one matching of clusters and classes, Hungarian method), NMI and ARI, in per cent.

    Args:
        predicted: int (N,) cluster of each image.
        true: int (N,) class of each image.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    clusters, classes = np.asarray(predicted), np.asarray(true)
    table = contingency_matrix(classes, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "acc": 100.0 * float(table[rows, columns].sum() / clusters.size),
        "nmi": 100.0 * float(normalized_mutual_info_score(classes, clusters)),
        "ari": 100.0 * float(adjusted_rand_score(classes, clusters)),
    }
