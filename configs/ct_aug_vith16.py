"""Stage 3 of MAE-CT_aug: contrastive tuning of the upper half of ViT-H/16.

    maect run --config=ct_aug_vith16

Starts from `runs/head_aug_vith16`: encoder, head and queue.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 40 epochs, 100,080 updates of 512 images x 2 views.
Expected (paper): k-NN 79.8 %, linear probe 82.2 % top-1 (the encoder's EMA).
"""

from configs import common


def get_config(argument=""):
    config = common.base("ct_aug_vith16", "H", patch_size=16)
    config.init_from = "runs/head_aug_vith16"
    common.add_ct(
        config,
        512,
        frozen_blocks=16,
        epochs=40,
        temperature=0.35,
        target_factor=0.995,
        head_base_lr=0.0005,
    )
    config.ct.photometric = common.strong_photometric()
    return common.finish(config, argument)
