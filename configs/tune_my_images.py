"""Contrastive tuning of a public MAE on your own images: head, tuning, evaluation.

maect run --config=tune_my_images --config.data.path=my_images \\
  --config.init_from=hf://facebook/vit-mae-base

`my_images` contains `train/` with the images, in class folders or without: no labels are needed. It
may contain `val/`, of the same layout, for the evaluation. `init_from` is an id of HuggingFace's
hub (extra [hub]), a file, or a run made of one by `maect import FILE OUT_RUN`; the encoder's sizes
come from it.
Hardware: one GPU, or one TPU host. Half of the blocks are frozen, the others see a batch in parts.
Duration: 20 epochs of forward passes for the head, 20 of tuning.
Expected: features whose clusters are the objects in your images; the report shows them.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(argument=""):
    config = common.base("tune_my_images")
    config.init_from = "runs/mae"
    config.data.path = "my_images"
    # Photographs are large: JPEGs are decoded only at the scale that the crops need.
    # They are not kept (data.cache): crops down to 8 % of an image need more pixels than fit.
    config.data.scaled_jpeg = True
    # The encoder sees a quarter of the batch at a time, which saves memory and does not change the
    # gradient. The head sees the whole batch, for its negatives and its statistics.
    config.encoder_microbatches = 4
    # Half or a quarter of the paper's, for one device. Learning rates scale with the batch.
    batch = 256
    head = common.add_head(config, batch)
    # None: half of the encoder's blocks, as in the paper.
    tuning = common.add_ct(config, batch, placeholder(int))
    # The paper's, for ImageNet's 1.3 million images. With fewer images an epoch has fewer updates:
    # train for more epochs.
    head.epochs = tuning.epochs = 20
    # The paper's for ViT-B; its L has 0.2 and its H 0.3.
    head.temperature = tuning.temperature = 0.15
    # 32 batches of neighbours. The paper's 65,536 are a twentieth of its images; a queue that is
    # longer than an epoch contains images twice.
    head.queue_size = tuning.queue_size = 8192
    # The neighbour is drawn from the 20 nearest, as in the paper.
    tuning.top_k = 20
    # Decay of the encoder's EMA, which is the result. The paper's 0.9999 averages over 10,000
    # updates; with fewer the EMA would stay near the untuned encoder. None: over a tenth of the
    # updates.
    with config.unlocked():
        tuning.ema_decay = placeholder(float)
    config.lock()
    evaluation = common.add_eval(config)
    # k-NN and the probe need labels, k-means does not.
    evaluation.knn.k = (1, 10, 20)  # for small sets, too
    evaluation.protocols = ("knn", "probe", "cluster")
    # 0: as many as classes; without labels a number is chosen. Or the number that you expect.
    evaluation.cluster.clusters = 0
    evaluation.cluster.runs = 20  # the paper's are 100
    return common.finish(config, argument)
