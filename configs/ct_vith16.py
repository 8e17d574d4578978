"""Stage 3: contrastive tuning of the upper half of ViT-H/16.

    maect run --config=ct_vith16

Starts from `runs/head_vith16`: encoder, head and queue.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 30 epochs, 75,060 updates of 512 images x 2 views.
Expected (paper): k-NN 79.4 %, linear probe 81.5 % top-1 (the encoder's EMA).
"""

from configs import common


def get_config(argument=""):
    config = common.base("ct_vith16", "H", patch_size=16)
    config.init_from = "runs/head_vith16"
    common.add_ct(config, 512, frozen_blocks=16, epochs=30, temperature=0.3, target_factor=0.995)
    return common.finish(config, argument)
