import sys

from pytorch_ood.metrics import OODMetrics
from pytorch_ood.utils import ToUnknown
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from sdood_plugin.hosts.pytorch_ood import SDOOD, SDOutliers, network_input

run, train, test, ood = sys.argv[1:]  # a run folder, and folders of images: training, ID test, OOD test
detector = SDOOD.from_run(run)  # the detector, banks and calibration of `sdood run`
outliers = SDOutliers(f"{run}/outliers", transform=network_input)  # target -1: what OutlierExposureLoss and the rest take
fit_on = DataLoader(ImageFolder(train, network_input) + outliers, batch_size=64)
own = SDOOD(detector.encoder, k_vote=10).fit(fit_on)  # or any other encoder; targets < 0 are the outliers
for name, chosen in {"of the run": detector, "fitted here": own}.items():
    metrics = OODMetrics()
    for x, y in DataLoader(ImageFolder(test, network_input) + ImageFolder(ood, network_input, ToUnknown()), batch_size=64):
        metrics.update(chosen(x), y)
    print(f"{name}: AUROC {metrics.compute()['AUROC']:.3f}")
