"""The loss of the three heads, and how a target names the class an outlier was made of."""

from __future__ import annotations

from typing import TypeVar

import torch
from pytorch_ood.api import LossInfo, Representation, Task
from pytorch_ood.utils import is_unknown
from torch import Tensor, nn

from ...config import DetectorConfig
from ...detector.loss import three_head_loss
from ...detector.network import Heads
from ...errors import UsageError
from .paper import PAPER

_IGNORED = -100  # cross-entropy of this label is zero and has no gradient (torch's ignore_index)
_Labels = TypeVar("_Labels", int, Tensor)


def outlier_target(label: _Labels) -> _Labels:
    """The target of an outlier made of class `label`: -2 - label. The same function gives the class back.

    Class 0 is -2, class 1 is -3, and so on: every one is < 0, an outlier to the host's `is_unknown` and to all its
    losses. -1 is left to outliers whose source is not known, which is what the host's own data sets return.
    """
    return -2 - label


class ThreeHeadLoss(nn.Module):
    """CE(g_bin, I) + (1 - I) CE(g_in, y) + I lambda CE(g_out, y), the mean over the batch (METHOD section 4).

    Targets: y >= 0 an ID sample of class y; `outlier_target(y)` = -2 - y an outlier made of class y; -1 an outlier of
    unknown source, which trains g_bin alone. So the host's outlier sets work as they are, and `SDOutliers(...,
    source_labels=True)` also trains g_out.
    """

    info = LossInfo(paper=PAPER, tasks={Task.CLASSIFICATION}, inputs={Representation.LOGITS}, supervised=True)

    def __init__(self, lambda_out: float = DetectorConfig().lambda_out) -> None:
        """Store lambda, the weight of g_out's term.

        Raises:
            UsageError: It is below 0.
        """
        super().__init__()
        if not lambda_out >= 0:
            raise UsageError("lambda_out", lambda_out, "0 or more", "0 leaves g_out's term away")
        self.lambda_out = lambda_out

    def forward(self, heads: Heads, target: Tensor) -> Tensor:
        """The scalar loss of the outputs of a `ThreeHeadNet` and int64 (B,) targets.

        Raises:
            UsageError: The outputs are not those of the three heads, or a target names a class that they do not have.
        """
        if not isinstance(heads, Heads):
            raise UsageError(
                "heads",
                f"a {type(heads).__name__}",
                "the outputs of a ThreeHeadNet",
                "give `network(images)`, not the logits of one head",
            )
        outlier = is_unknown(target)
        labels = torch.where(outlier, outlier_target(target), target)
        classes = heads.inside.shape[1]
        if len(labels) and int(labels.max()) >= classes:
            raise UsageError(
                "target",
                f"class {int(labels.max())}",
                f"classes 0 to {classes - 1}, of outliers -1 or -2 - class",
                "build the network with more classes or mend the labels",
            )
        return three_head_loss(heads, labels.masked_fill(labels < 0, _IGNORED), outlier, self.lambda_out)["loss"]
