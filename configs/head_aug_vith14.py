"""Stage 2 of MAE-CT_aug: the contrastive head on the frozen ViT-H/14.

    maect run --config=head_aug_vith14 \\
      --config.init_from=mae_pretrain_vit_huge.pth

Starts from `--config.init_from`: in the paper from MAE's public checkpoint, licensed CC BY-NC 4.0.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 20 epochs, 50,040 updates of 512 images x 2 views, encoder forward only.
Expected: the encoder does not change; `nn_accuracy` in metrics.jsonl rises.
"""

from configs import common


def get_config(argument=""):
    config = common.base("head_aug_vith14", "H", patch_size=14)
    head = common.add_head(config, batch_size=512)
    head.photometric = common.strong_photometric()
    return common.finish(config, argument)
