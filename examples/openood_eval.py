"""A run's detector beside stock postprocessors in OpenOOD's own table: python examples/openood_eval.py RUN DATA_ROOT"""

import os
import sys

from sdood_plugin.hosts.openood import Evaluator, SDOODPostprocessor, load_detector

if __name__ == "__main__":
    run, data_root = sys.argv[1:]
    net = load_detector(run, normalisation="cifar10")
    configs = os.environ["OPENOOD_ROOT"] + "/configs"
    settings = {"data_root": data_root, "config_root": configs, "num_workers": 2, "skip_absent": True}
    print(Evaluator(net, "cifar10", postprocessor=SDOODPostprocessor(outliers=run), **settings).eval_ood())
    for name in ("msp", "knn"):
        print(name, Evaluator(net, "cifar10", postprocessor_name=name, **settings).eval_ood(), sep="\n")
