"""Plug-ins for pytorch-ood: the detector, the loss of the three heads, the outlier set as a data set.

    detector = SDOOD(encoder).fit(loader)      # or SDOOD.from_run("runs/cifar10")
    scores = detector(images)                  # larger = more OOD, the host's sign and ours

Targets follow the host: y >= 0 is a class, y < 0 an outlier. Where an outlier's source class matters (`ThreeHeadLoss`),
`outlier_target` carries it in the same number; -1, the host's own outlier target, says that the source is not known.
"""

import warnings

import torch  # noqa: F401 - its own warning filters stay

with warnings.catch_warnings():  # the host's dependencies, scipy and sympy, add filters for the whole process
    import pytorch_ood.dataset.img
    import pytorch_ood.detector
    import pytorch_ood.loss

    from .detector import SDOOD
    from .loss import ThreeHeadLoss, outlier_target
    from .outliers import SDOutliers, network_input

__all__ = ["SDOOD", "SDOutliers", "ThreeHeadLoss", "network_input", "outlier_target", "register"]


def register() -> None:
    """Add the three classes to `pytorch_ood.detector`, `.loss` and `.dataset.img`, for code that looks names up there.

    The host has no registry; its lists of components are these namespaces and their `__all__`. Only this call changes them.
    """
    homes = {pytorch_ood.detector: SDOOD, pytorch_ood.loss: ThreeHeadLoss, pytorch_ood.dataset.img: SDOutliers}
    for module, component in homes.items():
        setattr(module, component.__name__, component)
        if component.__name__ not in getattr(module, "__all__", [component.__name__]):
            module.__all__.append(component.__name__)
