"""MIM-Refiner on ViT-H/14, first stage: the heads on the frozen encoder.

    maect run --config=refine_head_vith14 \\
      --config.init_from=mae_pretrain_vit_huge.pth

Starts from `--config.init_from`: in the paper from MAE's public checkpoint, licensed CC BY-NC 4.0.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 20 epochs, 50,040 updates of 512 images x 2 global and 10 local views, encoder forward
only.
Expected: the encoder does not change; `nn_accuracy` of each head in metrics.jsonl rises.
"""

from configs import common


def get_config(argument=""):
    config = common.base("refine_head_vith14", "H", patch_size=14)
    # Heads are behind blocks 20 to 30, and on the final feature.
    common.add_refine_head(config, 512, temperature=0.3, blocks=tuple(range(20, 31)))
    return common.finish(config, argument)
