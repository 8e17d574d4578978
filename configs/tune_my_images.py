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
    config.data.path = "my_images"
    # Photographs are large: no more of a JPEG is decoded than the crops need.
    config.data.scaled_jpeg = True
    # A quarter of the batch at a time goes through the encoder, which saves memory and leaves the
    # gradient as it is. The head sees the whole batch, for its negatives and its statistics.
    config.encoder_microbatches = 4
    # Half or a quarter of the paper's, for one device. Learning rates follow the batch.
    batch = 256
    head = common.add_head(config, batch)
    # None: half of the encoder's blocks, as in the paper, whatever its depth.
    tuning = common.add_ct(config, batch, placeholder(int))
    # The paper's, for ImageNet's 1.3 million images. Fewer images have fewer updates in an epoch:
    # raise these in turn.
    head.epochs = tuning.epochs = 20
    # The paper's for ViT-B; it tunes L with 0.2 and H with 0.3.
    head.temperature = tuning.temperature = 0.15
    # 32 batches of neighbours. The paper's 65,536 are a twentieth of its images; a queue that is
    # longer than an epoch would hold images twice.
    head.queue_size = tuning.queue_size = 8192
    # The neighbour is drawn among the 20 nearest, the paper's number.
    tuning.top_k = 20
    # The average of the encoder, which is the result. The paper's 0.9999 looks back over 10,000
    # updates; in fewer it would stay where it starts, at the untuned encoder. None: over a tenth of
    # them, whatever their number.
    with config.unlocked():
        tuning.ema_decay = placeholder(float)
    config.lock()
    evaluation = common.add_eval(config)
    # k-NN and the probe tell something where there are labels, k-means always.
    evaluation.protocols = ("knn", "probe", "cluster")
    # 0: as many as classes. Without labels nobody knows: say what you expect.
    evaluation.cluster.clusters = 0
    evaluation.cluster.runs = 20  # the paper's are 100
    return common.finish(config, argument)
