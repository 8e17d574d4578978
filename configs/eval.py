"""Evaluation of a run's encoder: k-NN, linear probe, k-means.

    python -m maect_jax.main --config=configs/eval.py --config.init_from=RUN --workdir=runs/eval_RUN

The encoder's sizes come from the run. Images: as in the training pages.
Hardware: anything; features are extracted once.
Duration: a forward pass over train and val; then k-means takes longest, by `eval.cluster.runs`.
Expected: the figures in the page of the run, but for the linear probe, which here trains on
features of centre crops (the paper's on augmented images); `results.json` in the workdir.
"""

from configs import common


def get_config(argument=""):
    config = common.base("eval")
    config.init_from = "runs/ct_vith16"
    common.add_eval(config)
    return common.finish(config, argument)
