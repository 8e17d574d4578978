"""Stage 1: MAE pre-training of ViT-B/16 on ImageNet-1k.

    maect run --config=mae_vitb16

Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 800 epochs, 1,000,800 updates of 1024 images x 2 crops.
Expected (paper): k-NN 51.1 %, linear probe 66.7 % top-1.
"""

from configs import common


def get_config(argument=""):
    config = common.base("mae_vitb16", "B", patch_size=16, pool="mean")
    common.add_mae(config, batch_size=1024)
    return common.finish(config, argument)
