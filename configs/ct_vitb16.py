"""Stage 3: contrastive tuning of the upper half of ViT-B/16.

    maect run --config=ct_vitb16

Starts from `runs/head_vitb16`: encoder, head and queue.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 20 epochs, 25,020 updates of 1024 images x 2 views.
Expected (paper): k-NN 64.1 %, linear probe 73.5 % top-1 (the encoder's EMA).
"""

from configs import common


def get_config(argument=""):
    config = common.base("ct_vitb16", "B", patch_size=16, pool="mean")
    config.init_from = "runs/head_vitb16"
    common.add_ct(config, 1024, frozen_blocks=6)
    return common.finish(config, argument)
