"""Evaluation of a run's encoder by the paper's protocols, on frozen features.

    maect run --config=eval --config.init_from=RUN --workdir=runs/eval_RUN

k-NN; linear probes on augmented images, and on centre crops (the fast variant); low-shot logistic
regression; k-means of all held-out images, of ImageNet-Dogs-15 and of ImageNet-10.
The encoder's sizes come from the run. Images: as for training. Images without labels are only
clustered, into a number of clusters that is chosen, or set by `--config.eval.cluster.clusters`;
protocols that need labels are skipped.
Hardware: any. Features are extracted once and saved. Run the same command to resume; after a change
of `eval` keys it recomputes only what they change.
Duration: one forward pass over train and val, and for `probe_augmented` one over train in each of
50 epochs; choose protocols with `--config.eval.protocols`.
Expected: on ImageNet-1k the paper's figures, which the report shows beside the measured ones.
"""

from configs import common


def get_config(argument=""):
    config = common.base("eval")
    config.init_from = "runs/ct_vith16"
    evaluation = common.add_eval(config)
    evaluation.protocols = ("knn", "cluster", "lowshot", "probe", "probe_augmented")
    evaluation.cluster.subsets = ("imagenet_dogs15", "imagenet10")
    return common.finish(config, argument)
