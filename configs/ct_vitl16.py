"""Stage 3: contrastive tuning of the upper half of ViT-L/16.

    maect run --config=ct_vitl16

Starts from `runs/head_vitl16`: encoder, head and queue.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 20 epochs, 25,020 updates of 1024 images x 2 views.
Expected (paper): k-NN 78.0 %, linear probe 80.2 % top-1 (the encoder's EMA).
"""

from configs import common


def get_config(argument=""):
    config = common.base("ct_vitl16", "L", patch_size=16)
    config.init_from = "runs/head_vitl16"
    common.add_ct(config, 1024, frozen_blocks=12, temperature=0.2)
    return common.finish(config, argument)
