"""A classifier of your own images, by the names of their clusters or of their folders.

    maect run --config=finetune_my_images --config.init_from=RUN --config.data.path=MY_IMAGES \\
      --config.data.labels=labels.csv --workdir=runs/named

`labels.csv` has the columns `image,label`: it comes from clusters that you have named
(`docs/clusters.md`), or from elsewhere. It need not list all images: those without a label are left
out. Without it class folders are the labels, and `val/` has those to measure on.
`load_encoder("runs/named").classify(images)` then names other images. The encoder's sizes come from
the run.
Hardware: two CPU cores for a small model (`quickstart:photos`); one GPU for a ViT-B.
Duration: 50 epochs; of 432 photographs, with that small model, 3 minutes on two shared cores.
Expected: `docs/clusters.md` has what came of 480 photographs of six kinds. For a ViT-B nothing was
measured.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(argument=""):
    config = common.base("finetune_my_images")
    config.init_from = "runs/tune_my_images"
    config.data.path = "my_images"
    # Photographs are large: JPEGs are decoded only at the scale that the crops need.
    config.data.scaled_jpeg = True
    # None: an eighth of the images, at most 64.
    finetune = common.add_finetune(config, placeholder(int))
    # Times batch / 256: 1e-3 for 64 images, as `finetune:10percent` has it for 256.
    finetune.base_lr = 4e-3
    # In so few updates a model learns little from mixed images (docs/clusters.md).
    finetune.update(
        crop_scale=(0.5, 1.0), erasing=0.0, mixup_alpha=0.0, cutmix_alpha=0.0, drop_path=0.0,
    )  # fmt: skip
    return common.finish(config, argument)
