"""Models of PyTorch, timm and transformers (extra `[peers]`)."""

import re
import warnings
from functools import partial

import numpy as np
import pytest

from maect_jax.models import vit
from maect_jax.stages import SAVED

reason = "the extra [peers] is not installed"


torch = pytest.importorskip("torch", reason=reason)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the peers warn of when they are imported
    timm = pytest.importorskip("timm", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)


def perturbed(model):
    """No bias zero and no scale one, lest a forgotten one go unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model.eval()


def arrays(tensors):
    return {name: x.detach().numpy() for name, x in tensors}


SMALL = dict(embed_dim=24, depth=2, num_heads=3)


def timm_model(**own):
    sizes = SMALL | dict(img_size=16, patch_size=4) | own
    return perturbed(timm.models.vision_transformer.VisionTransformer(**sizes))


def images_for(model, rng):
    height, width = model.patch_embed.img_size
    channels = model.patch_embed.proj.weight.shape[1]
    return rng.normal(size=(3, height, width, channels)).astype(np.float32)


def pixels(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def of_timm(peer, x):
    """The feature that timm's model pools."""
    with torch.no_grad():
        return peer.forward_head(peer.forward_features(x), pre_logits=True).numpy()


def loaded(path, format, auto=transformers.AutoModel):
    """The peer of an export, of timm by the call of its card: nothing is missing or left over."""
    if format == "hf":
        peer, given = auto.from_pretrained(path, output_loading_info=True)
        for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            assert not given[trouble], trouble
        return peer.eval()
    card = path.with_name(f"{path.name}.md").read_text()
    call = re.search(r"^model = (.*)$", card, re.MULTILINE)[1]
    names = {"timm": timm, "torch": torch, "partial": partial}
    return eval(call.replace(repr(path.name), repr(str(path))), names)


def features(found, images):
    """What an import makes of normalised images."""
    model = found.config.model
    module = vit.from_config(model).clone(dtype="float32")
    params = SAVED[found.kind].encoder_params(found.read())
    return np.asarray(vit.features(module, params, images, model.pool))
