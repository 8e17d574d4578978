"""Stage 2 of MAE-CT_aug: the contrastive head on the frozen ViT-L/16.

    maect run --config=head_aug_vitl16

Starts from `runs/mae_vitl16`.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 20 epochs, 25,020 updates of 1024 images x 2 views, encoder forward only.
Expected: the encoder does not change; `nn_accuracy` in metrics.jsonl rises.
"""

from configs import common


def get_config(argument=""):
    config = common.base("head_aug_vitl16", "L", patch_size=16)
    config.init_from = "runs/mae_vitl16"
    head = common.add_head(config, batch_size=1024)
    head.photometric = common.strong_photometric()
    return common.finish(config, argument)
