"""The comparators beside their official code, where a checkout of it is given by an environment variable.

MSCL_ROOT: talreiss/Mean-Shifted-Anomaly-Detection, whose k-NN score is DN2's of the same group too.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sdood_plugin.baselines.dn2 import knn_score
from sdood_plugin.baselines.mscl import mean_shifted_loss


def official(file: str, name: str, **names):
    """A function of the official code, by itself: its module would import networks and data sets."""
    root = os.environ.get("MSCL_ROOT")
    if not root:
        pytest.skip("MSCL_ROOT is not set: no official code to compare with")
    path = Path(root) / file
    (function,) = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name == name]
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names[name]


@pytest.mark.parametrize("is_angular", [False, True])
def test_mscl_loss_is_that_of_the_official_code(generator, is_angular):
    contrastive_loss = official("main.py", "contrastive_loss", torch=torch, F=F)
    # of unit length, as its network gives them
    first, second, others = (F.normalize(torch.randn(12, 7, generator=generator), dim=1) for _ in range(3))
    centre = others.mean(dim=0)
    c = F.normalize(centre, dim=-1) if is_angular else centre
    theirs = contrastive_loss(first - c, second - c)
    if is_angular:  # as its run_epoch adds it; 4 is what |phi - c|^2 of two views has beside -2 phi . c
        theirs = theirs + ((first - c) ** 2).sum(dim=1).mean() + ((second - c) ** 2).sum(dim=1).mean() - 4
    ours = mean_shifted_loss(first, second, centre, 2.0 if is_angular else 0.0)["loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_knn_score_is_that_of_the_official_code(generator):
    faiss = pytest.importorskip("faiss")
    theirs = official("utils.py", "knn_score", faiss=faiss, np=np)
    train, queries = torch.randn(200, 16, generator=generator), torch.randn(30, 16, generator=generator)
    torch.testing.assert_close(
        knn_score(train, queries), torch.from_numpy(theirs(train.numpy(), queries.numpy())), rtol=1e-4, atol=1e-3
    )
