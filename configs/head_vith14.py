"""Stage 2: the contrastive head on the frozen ViT-H/14.

    python -m maect_jax.main --config=configs/head_vith14.py \\
      --config.init_from=mae_pretrain_vit_huge.pth

Starts from what `--config.init_from` names: for the paper MAE's public checkpoint, which is under
CC BY-NC 4.0.
Images: data/imagenet/{train,val}/<class>/, or where `--config.data.path` points.
Hardware: TPU or GPU; `--dry_run` prints steps, memory of the state and FLOPs.
Duration: 20 epochs, 50,040 updates of 512 images x 2 views, encoder forward only.
Expected: the encoder stays as it is; `nn_accuracy` in metrics.jsonl rises.
"""

from configs import common


def get_config(argument=""):
    config = common.base("head_vith14", "H", patch_size=14)
    common.add_head(config, batch_size=512)
    return common.finish(config, argument)
