"""Contrastive tuning of a public MAE on your own images: head, tuning, evaluation.

maect run --config=tune_my_images --config.data.path=my_images \\
  --config.init_from=hf://facebook/vit-mae-base

`my_images` contains `train/` with the images, in class folders or without: no labels are needed. It
may contain `val/`, of the same layout, for the evaluation. `init_from` is an id of HuggingFace's
hub (extra [hub]), a file, or a run made of one by `maect import FILE OUT_RUN`; the encoder's sizes
come from it.
Hardware: one GPU, or one TPU host. Half of the blocks are frozen, the others see a batch in parts.
Batch, epochs, queue and learning rates follow from the number of images (`docs/recipe.md`).
Duration: 120 epochs of forward passes for the head and 120 of tuning for 1,000 images, 21 each for
a million.
Expected: clusters that are nearer to the objects in your images; the report shows them before and
after tuning. Nothing is promised for your images.
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
    head = common.add_head(config, batch_size=placeholder(int))
    # None: half of the encoder's blocks, as in the paper.
    tuning = common.add_ct(config, batch_size=placeholder(int), frozen_blocks=placeholder(int))
    common.follow_images(head, tuning)
    # Without these, tuning of small images gained less, or nothing (docs/recipe.md). Where colours
    # tell your images apart, set `saturation` and `hue` to 0 and `grayscale` to (0, 0).
    for stage in head, tuning:
        stage.photometric = common.mild_photometric()
    # The paper's 0.65 is for 100,000 updates; in fewer ones the lower blocks would hardly change.
    tuning.layer_decay = 0.9
    # The paper's for ViT-B; its L has 0.2 and its H 0.3.
    head.temperature = tuning.temperature = 0.15
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
