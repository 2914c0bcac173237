"""The training pipeline `train_sdood`: the host's loaders, evaluator, recorder and logger around our trainer."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...config import ScoringConfig
from ...detector.network import save_network
from ...errors import UsageError
from ...scoring.score import fit_score
from ...scoring.storage import save_score
from .checkpoints import build_network
from .compat import host_settings
from .device import on_device, replaced
from .host import require_host
from .imglist import check_imglist
from .network import SDOODNet
from .postprocessor import SDOODPostprocessor
from .trainer import SDOODTrainer

require_host()
from openood import pipelines as host_pipelines  # noqa: E402 - only after the host is on the path
from openood.datasets import get_dataloader  # noqa: E402
from openood.evaluators import get_evaluator  # noqa: E402
from openood.networks import utils as host_networks  # noqa: E402
from openood.recorders import get_recorder  # noqa: E402
from openood.utils import comm, setup_logger  # noqa: E402

log = logging.getLogger(__name__)
SPLITS = ("train", "oe", "val", "test")
_TRAINER_KEYS = {"name", "lambda_out"}


class TrainSDOOD:
    """Trains the three heads from a host config and leaves, beside the recorder's checkpoints, a detector folder.

    The data set needs the splits train, oe (outliers), val and test; `controls` (counted as ID) and `oe_heldout`
    (outliers of held-out sources, for alpha) are used where they are. The host augments `train` only; here outliers and
    controls get the same transform, because otherwise the black border of a random crop would tell ID from outlier.
    `detector.safetensors`, `bank.safetensors` and `score.json` hold the last epoch's network and the score calibrated
    on val: what `SDOODPostprocessor` and `load_detector` take.

    With several GPUs the host starts a process for each and its loaders give each a share of the images to train on;
    validation and the banks are of all images all the same.

    Args:
        config: The host's config.

    Raises:
        UsageError: The config, a list or a checkpoint is wrong.
    """

    def __init__(self, config: Any) -> None:
        check_config(config)
        self.config = config

    def run(self) -> None:
        """Train, test and write.

        Raises:
            UsageError: The network has no three heads; nothing has been written.
            RunError: The loss was not finite.
        """
        config = self.config
        net = _seeded_network(config)
        setup_logger(config)
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        loaders = get_dataloader(config)
        for name in ("oe", "controls"):
            if name in loaders:
                loaders[name].dataset.transform_image = loaders["train"].dataset.transform_image
        whole = {name: _whole(loader) for name, loader in loaders.items()}
        trainer = SDOODTrainer(net, loaders["train"], loaders["oe"], config, loaders.get("controls"))
        evaluator, is_main = get_evaluator(config), comm.is_main_process()
        recorder = get_recorder(config) if is_main else None
        for epoch in range(1, config.optimizer.num_epochs + 1):
            for loader in loaders.values():
                if isinstance(loader.sampler, torch.utils.data.distributed.DistributedSampler):
                    loader.sampler.set_epoch(epoch - 1)
            net, train_metrics = trainer.train_epoch(epoch)
            val_metrics = evaluator.eval_acc(net, whole["val"], None, epoch)
            comm.synchronize()
            if recorder is not None:
                recorder.save_model(net, val_metrics)
                recorder.report(train_metrics, val_metrics)
        test_metrics = evaluator.eval_acc(net, whole["test"])
        if recorder is not None:
            recorder.summary()
            log.info("test accuracy %.2f %%", 100 * test_metrics["acc"])
            _write_detector(getattr(net, "module", net), whole, Path(config.output_dir))


def _seeded_network(config: Any) -> Any:
    torch.manual_seed(config.seed)
    return build_network(config.network, config.dataset.num_classes)


def _whole(loader: Any) -> torch.utils.data.DataLoader:
    """All images of a loader in the order of their list; with several processes the host's loader gives each one a share."""
    return torch.utils.data.DataLoader(loader.dataset, loader.batch_size, num_workers=loader.num_workers)


@torch.no_grad()
def _write_detector(net: SDOODNet, loaders: dict[str, Any], folder: Path) -> None:
    net.eval()
    device = next(net.parameters()).device

    def features(split: str) -> torch.Tensor:
        if split not in loaders:
            return torch.empty(0, net.feature_size, device=device)
        return torch.cat([net(batch["data_aux"].to(device), return_feature=True)[1].float() for batch in loaders[split]])

    if "oe_heldout" not in loaders:
        log.warning("no split oe_heldout: the score is the distance alone, its votes have no held-out outliers to be weighed by")
    save_network(folder / "detector.safetensors", net.network)
    save_score(folder, fit_score(features("train"), features("oe"), features("val"), features("oe_heldout"), ScoringConfig()))


def check_config(config: Any) -> None:
    """Everything that can be wrong before training: lists, classes, keys, checkpoint.

    Raises:
        UsageError: Something is.
    """
    dataset = config.dataset
    if not dataset or not dataset.split_names:
        raise UsageError("dataset.split_names", dataset and dataset.split_names, "names of splits", "give the data set's YAML")
    for name in dataset.split_names:
        split = dataset.get(name)
        if not split or not split.imglist_pth:
            raise UsageError(f"dataset.{name}", split, "dataset_class, data_dir and imglist_pth", "give the YAML that has it")
        check_imglist(split.imglist_pth, split.data_dir, dataset.num_classes)
    network = config.network
    if not network or network.num_classes != dataset.num_classes:
        raise UsageError(
            "network.num_classes",
            network and network.num_classes,
            f"{dataset.num_classes} like dataset.num_classes",
            "use '@{dataset.num_classes}'",
        )
    if config.pipeline.name == "train_sdood":
        _check_train_sdood(config)
    if network.pretrained and network.name == "sdood":
        build_network(type(config)({**network, "num_gpus": 0}), dataset.num_classes)


def _check_train_sdood(config: Any) -> None:
    absent = [name for name in SPLITS if name not in config.dataset.split_names]
    unknown = sorted(set(config.trainer) - _TRAINER_KEYS)
    if absent or unknown:
        raise UsageError(
            "dataset.split_names" if absent else "trainer",
            config.dataset.split_names if absent else unknown,
            f"{', '.join(SPLITS)} among them" if absent else f"{', '.join(sorted(_TRAINER_KEYS))} only",
            "use a *_sdood_oe.yml beside the data set's own" if absent else "check the spelling",
        )


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """While it lasts the host's own pipelines know the network `sdood` and the postprocessor `sdood`."""
    stock_network = host_networks.get_network

    def network(config: Any) -> Any:
        return build_network(config, config.num_classes) if config.name == "sdood" else stock_network(config)

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(host_networks, get_network=network))
        for name, module in list(sys.modules.items()):
            if not name.startswith("openood.pipelines."):
                continue
            if "get_network" in vars(module):
                stack.enter_context(replaced(module, get_network=network))
            if "get_postprocessor" in vars(module):
                stock = vars(module)["get_postprocessor"]
                stack.enter_context(
                    replaced(
                        module,
                        get_postprocessor=lambda config, stock=stock: (
                            SDOODPostprocessor(config) if config.postprocessor.name == "sdood" else stock(config)
                        ),
                    )
                )
        yield


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Standard output and the global random states as before: the host's logger replaces the one and closes it when it is
    collected, and its pipelines seed the others."""
    stdout, states = sys.stdout, (random.getstate(), np.random.get_state(), torch.get_rng_state())
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        logger: Any = sys.stdout
        sys.stdout = stdout
        while logger is not stdout and hasattr(logger, "console"):
            if logger.file is not None:
                logger.file.close()
            logger.file, inner, logger.console = None, logger.console, io.StringIO()
            logger = inner
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.backends.cudnn.benchmark = benchmark


def run_pipeline(config: Any) -> None:
    """Run the pipeline a host config names, ours or one of the host's own, on `num_gpus` GPUs or on the CPU.

    Raises:
        UsageError: See `check_config`.
    """
    with _restored_process(), host_settings(), on_device("cuda" if config.num_gpus else "cpu"), registered():
        if config.pipeline.name == "train_sdood":
            TrainSDOOD(config).run()
        else:
            check_config(config)
            host_pipelines.get_pipeline(config).run()
