"""A classifier of your own images, by the names of their clusters or of their folders.

    maect run --config=finetune_my_images --config.init_from=RUN --config.data.path=MY_IMAGES \\
      --config.data.labels=labels.csv --workdir=runs/named

`labels.csv` has the columns `image,label`: it comes from the clusters that you have named
(`docs/clusters.md`), or from elsewhere. It need not list all images. Without it class folders are
the labels. `maect_jax.load_encoder("runs/named").classify(images)` then tells the names of others.
The encoder's sizes come from the run.
Hardware: two CPU cores for a small model (`quickstart:photos`); one GPU for a ViT-B.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(argument=""):
    config = common.base("finetune_my_images")
    config.init_from = "runs/tune_my_images"
    config.data.path = "my_images"
    config.data.scaled_jpeg = True
    common.add_finetune(config, placeholder(int))
    return common.finish(config, argument)
