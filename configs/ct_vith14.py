"""Stage 3: contrastive tuning of the upper half of ViT-H/14.

    maect run --config=ct_vith14

Starts from `runs/head_vith14`: encoder, head and queue.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 30 epochs, 75,060 updates of 512 images x 2 views.
Expected (paper): k-NN 79.1 %, linear probe 81.3 % top-1 (the encoder's EMA).
"""

from configs import common


def get_config(argument=""):
    config = common.base("ct_vith14", "H", patch_size=14)
    config.init_from = "runs/head_vith14"
    common.add_ct(config, 512, frozen_blocks=16, epochs=30, temperature=0.3, target_factor=0.995)
    return common.finish(config, argument)
