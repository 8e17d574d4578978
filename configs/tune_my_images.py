"""Contrastive tuning of a public MAE on your own images: head, tuning, evaluation.

python -m maect_jax.main --config=configs/tune_my_images.py --config.data.path=my_images \\
  --config.init_from=mae_pretrain_vit_base.pth --config.eval.cluster.clusters=20

`my_images` holds `train/` with the images, in folders of classes or as they come: no labels are
needed. It may hold `val/`, laid out likewise, to be evaluated on. The encoder's sizes come from the
file, which may also be a run that `python -m maect_jax.convert import FILE OUT_RUN` made of it.
Hardware: one GPU, or one TPU host. Half of the blocks are frozen, the others see a batch in parts.
Duration: 20 epochs of forward passes for the head, 20 of tuning.
Expected: features whose clusters are the objects in your images; the page shows them.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(argument=""):
    config = common.base("tune_my_images")
    config.init_from = "runs/mae"
    config.data.path = "data/my_images"
    config.data.scaled_jpeg = True  # photographs come large; this decodes no more than is needed
    # A quarter of the batch at a time goes through the encoder: a quarter of the memory, and the
    # same gradient. The head sees the whole batch, which its negatives and statistics are.
    config.encoder_microbatches = 4
    # 256 images, half or a quarter of the paper's: learning rates follow the batch by themselves.
    batch = 256
    head = common.add_head(config, batch)
    # Half of the encoder's blocks, as in the paper, whatever its depth.
    tuning = common.add_ct(config, batch, placeholder(int))
    # The paper's 65,536 neighbours are a twentieth of ImageNet. Of some thousand images a queue of
    # that size holds each several times; this one is 32 batches long.
    head.queue_size = tuning.queue_size = 8192
    # 0.9999 looks back over 10,000 updates, which ImageNet takes in 8 epochs of such batches, and
    # your images may not in all: over 1,000.
    tuning.ema_decay = 0.999
    evaluation = common.add_eval(config)
    # k-NN and the probe speak where there are labels, k-means always.
    evaluation.protocols = ("knn", "probe", "cluster")
    # 0: as many clusters as classes. Without labels nobody knows: say what you expect.
    evaluation.cluster.clusters = 0
    evaluation.cluster.runs = 20
    return common.finish(config, argument)
