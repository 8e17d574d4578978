"""Evaluation of a run's encoder: k-NN, linear probe, k-means.

    python -m maect_jax.main --config=configs/eval.py --config.init_from=RUN --workdir=runs/eval_RUN

The encoder's sizes come from the run. Images: as in the training pages.
Hardware: anything; features are extracted once.
Duration: one forward pass over train and val, then minutes.
Expected: the figures in the page of the run; `results.json` in the workdir.
"""

from configs import common


def get_config(argument=""):
    config = common.base("eval")
    config.init_from = "runs/ct_vith16"
    common.add_eval(config)
    return common.finish(config, argument)
