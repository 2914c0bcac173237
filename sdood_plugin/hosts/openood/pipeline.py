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
from ...scoring.score import fit_score
from ...scoring.storage import save_score
from .checkpoints import build_network
from .checks import check_config
from .compat import host_settings
from .device import on_device, replaced
from .host import require_host
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


class TrainSDOOD:
    """Trains the three heads from a host config and leaves, beside the recorder's checkpoints, a detector folder.

    The data set needs the splits train, oe (outliers), val and test; `controls` (counted as ID) and, of held-out sources
    and for alpha alone, `oe_heldout` and `controls_heldout` are used where they are. The host augments `train` only; here
    outliers and controls get the same transform, because otherwise the black border of a random crop would tell ID from
    outlier. `detector.safetensors`, `bank.safetensors` and `score.json` hold the last epoch's network and the score
    calibrated on val: what `SDOODPostprocessor` and `load_detector` take.

    With several GPUs the host starts a process for each and its loaders give each a share of the images, BatchNorm works
    over all shares as in the host's own pipelines, and the banks, made by one process, are of all images all the same.
    Where the data set says `test.labelled: False` (an export of pseudo-labels) the test images are not classified.

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
        net = _synchronised(_seeded_network(config))
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        loaders = get_dataloader(config)
        for name in ("oe", "controls"):
            if name in loaders:
                loaders[name].dataset.transform_image = loaders["train"].dataset.transform_image
        trainer = SDOODTrainer(net, loaders["train"], loaders["oe"], config, loaders.get("controls"))
        evaluator = get_evaluator(config)
        recorder = get_recorder(config) if comm.is_main_process() else None
        setup_logger(config)
        for epoch in range(1, config.optimizer.num_epochs + 1):
            for loader in loaders.values():
                if isinstance(loader.sampler, torch.utils.data.distributed.DistributedSampler):
                    loader.sampler.set_epoch(epoch - 1)
            net, train_metrics = trainer.train_epoch(epoch)
            val_metrics = _evaluated(evaluator, net, loaders["val"], epoch)
            comm.synchronize()
            if recorder is not None:
                recorder.save_model(net, val_metrics)
                recorder.report(train_metrics, val_metrics)
        labelled = config.dataset.test.labelled is not False
        test_metrics = _evaluated(evaluator, net, loaders["test"]) if labelled else None
        if recorder is not None:
            recorder.summary()
            if test_metrics is not None:
                log.info("test accuracy %.2f %%", 100 * test_metrics["acc"])
            banks = {name: _whole(loader) for name, loader in loaders.items()}
            _write_detector(getattr(net, "module", net), banks, Path(config.output_dir))


def _seeded_network(config: Any) -> Any:
    torch.manual_seed(config.seed)
    return build_network(config.network, config.dataset.num_classes)


def _synchronised(net: Any) -> Any:
    """BatchNorm over all processes' images, as the host's pipelines have it; torch has that on GPUs only."""
    if comm.get_world_size() > 1 and next(net.parameters()).is_cuda:
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net


def _evaluated(evaluator: Any, net: Any, loader: Any, epoch: int = -1) -> dict[str, float]:
    """The host's accuracy and loss of a split, each process over its share; the host adds up the shares' mean losses.

    Where the images do not divide by the processes, the host fills the shares up with images that then count twice.
    """
    metrics = evaluator.eval_acc(net, loader, None, epoch)
    return {**metrics, "loss": metrics["loss"] / comm.get_world_size()}


def _whole(loader: Any) -> torch.utils.data.DataLoader:
    """All images of a loader in the order of their list; with several processes the host's loader gives each one a share."""
    return torch.utils.data.DataLoader(loader.dataset, loader.batch_size, num_workers=loader.num_workers)


@torch.no_grad()
def _write_detector(net: SDOODNet, loaders: dict[str, Any], folder: Path) -> None:
    net.eval()
    device = next(net.parameters()).device

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and labels of a split, of an absent one none."""
        if split not in loaders:
            return torch.empty(0, net.feature_size, device=device), torch.empty(0, dtype=torch.int64, device=device)
        found = [(net(batch["data_aux"].to(device), return_feature=True)[1], batch["label"]) for batch in loaders[split]]
        made, labels = (torch.cat(column) for column in zip(*found, strict=True))
        return made.float(), labels.to(device)

    if "oe_heldout" not in loaders:
        log.warning("no split oe_heldout: the score is the distance alone, its votes have no held-out outliers to be weighed by")
    elif "controls_heldout" not in loaders:
        log.info("no split controls_heldout: the weight of the votes is chosen against images alone")
    save_network(folder / "detector.safetensors", net.network)
    (outliers, classes), (heldout, heldout_classes) = features("oe"), features("oe_heldout")
    score = fit_score(
        features("train")[0],
        outliers,
        features("val")[0],
        heldout,
        ScoringConfig(),
        outlier_classes=classes,
        heldout_classes=heldout_classes,
        heldout_controls=features("controls_heldout")[0],
    )
    save_score(folder, score)


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
    collected, and its pipelines seed the others (GPUs too, which have no state yet where CUDA was not used before)."""
    stdout, states = sys.stdout, (random.getstate(), np.random.get_state(), torch.get_rng_state())
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
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
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
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
