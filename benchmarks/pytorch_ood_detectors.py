"""Every detector class of pytorch-ood on one frozen backbone: what it is fitted on and what it scores, or why it cannot be run.

Constructor arguments are the host's defaults wherever it has them. Three kinds of input:

- "features": the backbone's output (B, D), with a linear head where logits are needed. Detectors that shape activations
  take it as a map (B, D, 1, 1), the place that ReAct, ASH and SCALE name for it: just before the last linear layer.
- "maps": the input of the backbone's last block, (B, C, H, W) or, of a transformer, (B, D, tokens, 1), with the rest of
  the network behind it. Layers are that map and the last block's output.
- "images": the whole network. For detectors that move the image itself.

The covariance of features behind a LayerNorm, as a ViT's, is singular, and the host inverts it in float32: RMD, Mahalanobis
and MahalanobisODIN read lower than the methods are (with 600 training and 80 + 80 test images RMD had an AUROC of 63 on
CIFAR-100, and 89 in float64). They stay as the host computes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytorch_ood.detector as host
import torch
from pytorch_ood.loss import VirtualOutlierSynthesizingRegLoss
from sklearn.linear_model import LogisticRegression
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sdood_plugin.backbones import SmallCNN
from sdood_plugin.features import Backbone

STD = [0.5, 0.5, 0.5]  # of the pixels that `network_input` gives
UNSPLIT = "needs feature maps or several layers; this backbone's layers are not told apart here"
MCM = "needs text embeddings of the class names from a vision-language model; an image backbone has none"


class Tail(NamedTuple):
    """The end of a backbone: the module before which maps are taken, and what makes features of them."""

    start: nn.Module
    block: nn.Module  # maps -> maps
    pool: nn.Module  # maps -> features


class Train(NamedTuple):
    """What detectors are fitted on: features (N, D), maps where the backbone has a tail, labels (N,)."""

    features: Tensor
    maps: Tensor | None
    labels: Tensor


class Recipe(NamedTuple):
    """A detector of the host: the kind of its input, and what gives it fitted."""

    level: str
    fitted: Callable[[], Any]


class OnTokens(nn.Module):
    """A module that takes tokens (B, T, D), for maps (B, D, T, 1); tokens that it returns become maps again."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps -> maps, or whatever the modules make of tokens."""
        return as_maps(self.body(maps.flatten(2).mT))


class ClassToken(nn.Module):
    """A transformer's normalised tokens to its features."""

    def __init__(self, body: VisionTransformer) -> None:
        super().__init__()
        self.body = body

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D) -> features (B, D)."""
        return self.body.forward_head(tokens, pre_logits=True)


class Leaf(nn.Module):
    """The identity; gradients can be taken with respect to its output, even though all weights are frozen."""

    def forward(self, maps: Tensor) -> Tensor:
        """The same values without a past."""
        return maps.detach().requires_grad_()


def as_maps(values: Tensor) -> Tensor:
    """Tokens (B, T, D) as maps (B, D, T, 1); anything else as it is."""
    return values.mT[..., None] if values.dim() == 3 else values


def split(backbone: Backbone) -> Tail | None:
    """The tail of a backbone whose layers are known."""
    body = backbone.body
    if isinstance(body, VisionTransformer):
        block: Any = body.blocks[-1]
        return Tail(block, OnTokens(block), OnTokens(body.norm, ClassToken(body)))
    if isinstance(body, ResNet):
        return Tail(body.layer4, body.layer4, body.global_pool)  # type: ignore[arg-type]
    if isinstance(body, SmallCNN):
        return Tail(body.layers[-3], body.layers[-3:], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    return None


def learn(
    loss: Callable[[Tensor, Tensor], Tensor], parameters: Iterable[nn.Parameter], train: Train, *, rate: float, steps: int
) -> None:
    """Lower loss(features, labels) by Adam on batches of 128."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        rows = torch.randint(len(train.labels), (128,))
        optimizer.zero_grad()
        loss(train.features[rows], train.labels[rows]).backward()
        optimizer.step()


def dropout_head(head: nn.Linear, train: Train) -> nn.Module:
    """The head trained on with dropout before it; the backbones themselves have none."""
    trained = nn.Sequential(nn.Dropout(0.5), copy.deepcopy(head).requires_grad_())
    learn(lambda z, y: nn.functional.cross_entropy(trained(z), y), trained.parameters(), train, rate=1e-3, steps=300)
    return trained.eval()


def energy_weights(head: nn.Linear, train: Train) -> Tensor:
    """Class weights of the energy (1, K), learned from 1 by the host's VOS loss; the head stays as it is."""
    weights, classifier = nn.Linear(head.out_features, 1), nn.Linear(1, 2)
    nn.init.ones_(weights.weight)
    queue = int(train.labels.bincount().min())
    vos = VirtualOutlierSynthesizingRegLoss(classifier, weights, head, sample_number=queue, sample_from=100)
    vos(head(train.features), train.features, train.labels)  # fills the queues its virtual outliers are drawn from
    learned = [*weights.parameters(), *classifier.parameters()]
    learn(lambda z, y: vos(head(z), z, y), learned, train, rate=1e-2, steps=50)
    return weights.weight.detach()


def linear_head(features: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression as a frozen layer."""
    fitted = LogisticRegression(max_iter=2000).fit(features.numpy(), labels.numpy())
    head = nn.Linear(features.shape[1], int(labels.max()) + 1).requires_grad_(False)
    head.weight.copy_(torch.from_numpy(fitted.coef_))
    head.bias.copy_(torch.from_numpy(fitted.intercept_))
    return head


def recipes(backbone: Backbone, train: Train, device: str, batch_size: int) -> dict[str, Recipe | str]:
    """Every detector of the host by the name of its class: how to get it fitted, or why that cannot be had.

    A tenth of the training samples is kept from the linear head, for the two detectors that calibrate its logits.
    """
    z, maps, y = train
    held = torch.randperm(len(y)) < len(y) / 10
    head = linear_head(z[~held], y[~held])
    logits, classes, same = head(z), head.out_features, nn.Identity()
    unpooled, flat = nn.Unflatten(1, (z.shape[1], 1, 1)), nn.Sequential(nn.Flatten(), head)
    far_head = copy.deepcopy(head).to(device)

    def features(detector: Any) -> Recipe:
        return Recipe("features", lambda: detector.fit_features(z, y) if detector.requires_fit else detector)

    def shaped(kind: Any) -> Recipe:
        detector, as_map = kind(unpooled, flat), z[..., None, None]
        return Recipe("features", lambda: detector.fit_feature_maps(as_map, y) if detector.requires_fit else detector)

    def on_logits(detector: Any, rows: Tensor | None = None) -> Recipe:
        given = (logits, y) if rows is None else (logits[rows], y[rows])
        return Recipe("features", lambda: detector.fit_logits(*given) if detector.requires_fit else detector)

    def layered(build: Callable[[list[nn.Module], nn.Module], Any]) -> Recipe | str:
        tail = split(backbone)
        if maps is None or tail is None:
            return UNSPLIT
        loader = DataLoader(TensorDataset(maps, y), batch_size=batch_size)
        layers, end = [Leaf(), tail.block], nn.Sequential(tail.pool, far_head)
        return Recipe("maps", lambda: build(layers, end).to(device).fit(loader))

    return {
        "ASH": shaped(host.ASH),
        "DICE": features(host.DICE(same, head.weight, head.bias, p=0.9)),
        "EnergyBased": on_logits(host.EnergyBased(head)),
        "Entropy": on_logits(host.Entropy(head)),
        "fDBD": features(host.fDBD(same, head)),
        "GEN": on_logits(host.GEN(head)),
        "GMM": features(host.GMM(same)),
        "GradNorm": Recipe("features", lambda: host.GradNorm(head, param_filter=lambda name: name == "weight")),
        "GradUncertainty": Recipe("features", lambda: host.GradUncertainty(head)),
        "Gram": layered(lambda layers, end: host.Gram(end, layers, classes)),
        "KLMatching": on_logits(host.KLMatching(head), held),
        "KNN": features(host.KNN(same, k=min(50, len(z)))),
        "LTS": features(host.LTS(same, head)),
        "Mahalanobis": features(host.Mahalanobis(same)),
        "MahalanobisODIN": Recipe(
            "images", lambda: host.MahalanobisODIN(backbone, norm_std=STD).fit_features(z.to(device), y.to(device))
        ),
        "MaxLogit": on_logits(host.MaxLogit(head)),
        "MaxSoftmax": on_logits(host.MaxSoftmax(head)),
        "MCD": Recipe("features", lambda: host.MCD(dropout_head(head, train))),
        "MCM": MCM,
        "MultiMahalanobis": layered(lambda layers, end: host.MultiMahalanobis(layers)),
        "NACUE": layered(lambda layers, end: host.NACUE(nn.Sequential(*layers, end), layers, device=device)),
        "NCI": features(host.NCI(same, head)),
        "NNGuide": features(host.NNGuide(same, head)),
        "ODIN": Recipe("images", lambda: host.ODIN(nn.Sequential(backbone, far_head), norm_std=STD)),
        "OpenMax": on_logits(host.OpenMax(head)),
        "PNML": features(host.PNML(same, head)),
        "RankFeat": layered(lambda layers, end: host.RankFeat(nn.Sequential(*layers), end)),
        "ReAct": shaped(host.ReAct),
        "RMD": features(host.RMD(same)),
        "SCALE": shaped(host.SCALE),
        "SHE": features(host.SHE(same, head)),
        "TemperatureScaling": on_logits(host.TemperatureScaling(head), held),
        "ViM": features(host.ViM(same, d=z.shape[1] // 2, w=head.weight, b=head.bias)),
        "VRA": shaped(host.VRA),
        "WeightedEBO": Recipe("features", lambda: host.WeightedEBO(head, energy_weights(head, train))),
    }
