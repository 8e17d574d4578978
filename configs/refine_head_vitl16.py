"""MIM-Refiner on ViT-L/16, first stage: the heads on the frozen encoder.

    maect run --config=refine_head_vitl16

Starts from `runs/mae_vitl16`.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 20 epochs, 25,020 updates of 1024 images x 2 global and 10 local views, encoder forward
only.
Expected: the encoder does not change; `nn_accuracy` of each head in metrics.jsonl rises.
"""

from configs import common


def get_config(argument=""):
    config = common.base("refine_head_vitl16", "L", patch_size=16)
    config.init_from = "runs/mae_vitl16"
    # Heads are behind blocks 16 to 22, and on the final feature.
    common.add_refine_head(config, batch_size=1024)
    return common.finish(config, argument)
