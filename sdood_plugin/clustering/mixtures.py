"""Clustering of frozen features without training: k-means and a Gaussian mixture, scikit-learn's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..randomness import derive_seed

COMPONENTS = 32  # principal components a Gaussian mixture works on


def k_means(features: torch.Tensor, clusters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of ten k-means runs on float (N, D) features of unit length.

    Returns:
        int64 (N,) labels, and float (N,) confidence: how much nearer the own centre is than the next, 0 to 1.
    """
    from sklearn.cluster import KMeans

    points = F.normalize(features, dim=1).cpu().numpy()
    model = KMeans(clusters, n_init=10, random_state=derive_seed(seed, "kmeans") % 2**32).fit(points)
    distances = torch.from_numpy(model.transform(points)).sort(dim=1).values
    return torch.from_numpy(model.labels_).long(), (1 - distances[:, 0] / distances[:, 1].clamp_min(1e-12)).float()


def gaussian_mixture(features: torch.Tensor, clusters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian mixture, begun from k-means, on the first principal components of float (N, D) features of unit length.

    Returns:
        int64 (N,) labels, and float (N,) their posterior probability.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    points = F.normalize(features, dim=1).double().cpu().numpy()
    state = derive_seed(seed, "gmm") % 2**32
    reduced = PCA(min(COMPONENTS, *points.shape), random_state=state).fit_transform(points)
    posterior = torch.from_numpy(GaussianMixture(clusters, random_state=state).fit(reduced).predict_proba(reduced))
    confidence, labels = posterior.max(dim=1)
    return labels, confidence.float()
