"""From nothing to tuned features on Fashion-MNIST, which ships with the package.

    python -m maect_jax.main --config=configs/quickstart.py

A small ViT goes through all stages (mae, head, ct) and is evaluated on held-out images against
raw pixels. Hardware: two CPU cores and 4 GiB. The run's folder is `runs/quickstart`.
"""

from configs import common


def get_config(argument=""):
    config = common.base("quickstart", "Ti", patch_size=7)
    common.small_images(config)
    config.model.update(width=128, depth=6, heads=4)
    config.log_every = 10
    config.checkpoint_every = 1

    mae = common.add_mae(config, batch_size=256)
    mae.update(epochs=10, warmup_epochs=1, base_lr=5e-4)
    mae.decoder.update(width=64, depth=2, heads=4)

    small_head = dict(queue_size=4096, projector_hidden=256, projector_out=64, predictor_hidden=512)
    head = common.add_head(config, batch_size=256)
    head.update(epochs=2, base_lr=5e-4, crop_scale=(0.2, 1.0), **small_head)

    ct = common.add_ct(config, 256, frozen_blocks=3, base_lr=5e-4, head_base_lr=5e-4, top_k=10)
    ct.update(epochs=5, ema_decay=0.99, crop_scale=(0.2, 1.0), **small_head)

    evaluation = common.add_eval(config)
    evaluation.pixels = True
    evaluation.knn.update(k=(1, 10, 20), standardise=True)
    return common.finish(config, argument)
