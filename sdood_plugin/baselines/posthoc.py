"""Post-hoc comparators: pytorch-ood's detectors on the outputs of one network; larger = more OOD."""

from __future__ import annotations

import torch

from ..errors import UsageError

POSTHOC = ("msp", "energy", "knn", "mahalanobis", "vim")
_KNN_NEIGHBOURS = 50  # the paper's choice for CIFAR-10 and pytorch-ood's default


def posthoc_scores(
    method: str, train: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, queries: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Scores of several sets of images under one method.

    Args:
        method: One of `POSTHOC`.
        train: Features float (N, D) and labels int64 (N,) of the training images.
        weight: float (C, D) of the classification layer.
        bias: float (C,) of it.
        queries: Features float (B, D) of each set.

    Returns:
        float (B,) for each set.

    Raises:
        UsageError: Unknown method.
    """
    from pytorch_ood.detector import KNN, EnergyBased, Mahalanobis, MaxSoftmax, ViM

    features, labels = (tensor.cpu() for tensor in train)
    weight, bias = weight.detach().float().cpu(), bias.detach().float().cpu()
    queries = [query.float().cpu() for query in queries]
    if method in ("msp", "energy"):
        score = MaxSoftmax.score if method == "msp" else EnergyBased.score
        return [score(query @ weight.T + bias) for query in queries]
    present = torch.unique(labels, return_inverse=True)[1]  # Mahalanobis wants labels without gaps
    if method == "knn":
        detector = KNN(None, k=min(_KNN_NEIGHBOURS, len(features))).fit_features(features, labels)
    elif method == "mahalanobis":
        detector = Mahalanobis(None).fit_features(features, present)
    elif method == "vim":
        detector = ViM(None, d=_vim_dimension(features.shape[1], len(weight)), w=weight, b=bias).fit_features(features, labels)
    else:
        raise UsageError("comparator", method, f"one of {', '.join(POSTHOC)}", "check the name")
    return [detector.predict_features(query).float() for query in queries]


def _vim_dimension(width: int, classes: int) -> int:
    """The principal subspace: half of a narrow feature, the number of classes at least (the paper: 512 of 768, 1000 of 2048)."""
    return max(min(classes, width - 1), width // 2)
