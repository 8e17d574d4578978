"""MIM-Refiner from a public MAE on your own images: heads, encoder, evaluation.

maect run --config=refine_my_images --config.data.path=my_images \\
  --config.init_from=hf://facebook/vit-mae-base

`my_images` contains `train/` with the images, in class folders or without: no labels are needed. It
may contain `val/`, of the same layout, for the evaluation. `init_from` is an id of HuggingFace's
hub (extra [hub]), a file, or a run made of one by `maect import FILE OUT_RUN`; the encoder's sizes
come from it.
Hardware: one GPU, or one TPU host. All blocks are tuned, and see a batch in parts.
Batch, epochs, queue and learning rates follow from the number of images (`docs/recipe.md`).
Duration: as many epochs as in tune_my_images; a step takes several times as long, as there are ten
more views of an image.
Expected: clusters that are nearer to the objects in your images; the report shows them before and
after tuning. Nothing is promised for your images.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(argument=""):
    config = common.base("refine_my_images")
    config.init_from = "runs/mae"
    config.data.path = "my_images"
    # Photographs are large: JPEGs are decoded only at the scale that the crops need.
    # They are not kept (data.cache): crops down to 5 % of an image need more pixels than fit.
    config.data.scaled_jpeg = True
    # The encoder sees an eighth of the batch at a time, which saves memory and does not change the
    # gradient. The heads see the whole batch, for their negatives and their statistics.
    config.encoder_microbatches = 8
    # Heads are behind the blocks from two thirds of the depth on, and on the final feature.
    head = common.add_refine_head(config, batch_size=placeholder(int))
    refine = common.add_refine(config, batch_size=placeholder(int))
    common.follow_images(head, refine)
    # Decay of the encoder's EMA, which is the result. The authors' 0.9999 averages over 10,000
    # updates; with fewer the EMA would stay near the encoder that it starts from. None: over a
    # tenth of the updates.
    with config.unlocked():
        refine.ema_decay = placeholder(float)
    config.lock()
    evaluation = common.add_eval(config)
    # k-NN and the probe need labels, k-means does not.
    evaluation.knn.k = (1, 10, 20)  # for small sets, too
    evaluation.protocols = ("knn", "probe", "cluster")
    # 0: as many as classes; without labels a number is chosen. Or the number that you expect.
    evaluation.cluster.clusters = 0
    evaluation.cluster.runs = 20  # the authors' are 100
    return common.finish(config, argument)
