"""Stage 3 of MAE-CT_aug: contrastive tuning of the upper half of ViT-B/16.

    maect run --config=ct_aug_vitb16

Starts from `runs/head_aug_vitb16`: encoder, head and queue.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 80 epochs, 100,080 updates of 1024 images x 2 views.
Expected (paper): k-NN 73.4 %, linear probe 76.9 % top-1 (the encoder's EMA).
"""

from configs import common


def get_config(argument=""):
    config = common.base("ct_aug_vitb16", "B", patch_size=16, pool="mean")
    config.init_from = "runs/head_aug_vitb16"
    common.add_ct(config, 1024, frozen_blocks=6, epochs=80, top_k=10, head_base_lr=0.0005)
    config.ct.photometric = common.strong_photometric()
    return common.finish(config, argument)
