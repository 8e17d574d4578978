"""Evaluation of a run's encoder by the paper's protocols, on frozen features.

    python -m maect_jax.main --config=configs/eval.py --config.init_from=RUN --workdir=runs/eval_RUN

k-NN; linear probes on augmented images, and on centre crops (the fast variant); low-shot logistic
regression; k-means of all held-out images, of ImageNet-Dogs-15 and of ImageNet-10.
The encoder's sizes come from the run. Images: as in the training pages; those without labels are
clustered (`--config.eval.cluster.clusters=K`), what needs labels is skipped.
Hardware: anything. Features are extracted once and kept; the same command goes on where it was
stopped, and computes anew only what other `eval` keys change.
Duration: a forward pass over train and val for everything but `probe_augmented`, which takes one
over train in each of 50 epochs; `--config.eval.protocols` names what is wanted.
Expected: on ImageNet-1k the paper's figures, which the page shows beside these.
"""

from configs import common


def get_config(argument=""):
    config = common.base("eval")
    config.init_from = "runs/ct_vith16"
    evaluation = common.add_eval(config)
    evaluation.protocols = ("knn", "cluster", "lowshot", "probe", "probe_augmented")
    evaluation.cluster.subsets = ("imagenet_dogs15", "imagenet10")
    return common.finish(config, argument)
