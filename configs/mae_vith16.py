"""Stage 1: MAE pre-training of ViT-H/16 on ImageNet-1k.

    maect run --config=mae_vith16

Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 800 epochs, 2,001,600 updates of 512 images x 2 crops.
Expected (paper): k-NN 61.1 %, linear probe 78.0 % top-1.
"""

from configs import common


def get_config(argument=""):
    config = common.base("mae_vith16", "H", patch_size=16)
    common.add_mae(config, batch_size=512)
    return common.finish(config, argument)
