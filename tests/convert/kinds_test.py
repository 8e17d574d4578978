"""Kinds of Vision Transformers, made at random by their own code (extra `[peers]`): what they write
is read with the same features, and what is written they read."""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from maect_jax import config as configs
from maect_jax.convert import exporting, importing, names, tensors
from maect_jax.convert.__main__ import read_run
from maect_jax.convert.importing import Overrides
from maect_jax.errors import UserError
from maect_jax.evals import ON_REQUEST
from maect_jax.models import vit
from maect_jax.stages import SAVED
from tests.helpers import CONFIGS
from tests.helpers.common import assert_trees_equal, run_on
from tests.helpers.golden_figures import FORWARD, assert_close
from tests.helpers.peers import (
    SMALL,
    arrays,
    features,
    loaded,
    of_timm,
    perturbed,
    pixels,
    timm,
    torch,
    transformers,
)

SIDE, PATCH, WIDTH = 16, 4, SMALL["embed_dim"]
HF = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=PATCH
)


def hf(name, **own):
    """A model of transformers, whose config has its width of the MLP or a ratio of 4."""
    config = getattr(transformers, f"{name}Config")
    ratio = "mlp_ratio" in config().to_dict()
    sizes = HF | ({} if ratio else {"intermediate_size": 4 * WIDTH})
    return perturbed(getattr(transformers, f"{name}Model")(config(**sizes, **own)))


def timm_kind(kind=timm.models.vision_transformer.VisionTransformer, **own):
    sizes = SMALL | dict(img_size=SIDE, patch_size=PATCH, num_classes=0)
    return perturbed(kind(**sizes | own))


def write_hf(peer, folder):
    peer.save_pretrained(folder)
    return folder


def write_timm(peer, folder, rename=dict, wrap=None):
    """A state dict, as another library names it, as safetensors, or in dicts as a pickle."""
    found = rename(arrays(peer.state_dict().items()))
    if wrap is None:
        path = folder / "peer.safetensors"
        save_file({name: np.ascontiguousarray(x) for name, x in found.items()}, path)
    else:
        path = folder / "peer.pth"
        torch.save(wrap({name: torch.tensor(x) for name, x in found.items()}), path)
    return path


def first(peer, x):
    with torch.no_grad():
        return peer(x).last_hidden_state[:, 0].numpy()


def pooled(peer, x):
    with torch.no_grad():
        return peer(x).pooler_output.numpy()


def mean(peer, x):
    with torch.no_grad():
        return peer(x).last_hidden_state.mean(1).numpy()


def with_rows(tensors, count):
    """The position embedding with rows for tokens, which lose what these add to them."""
    rows = np.random.default_rng(1).normal(size=(1, count, WIDTH)).astype(np.float32)
    position = np.concatenate([rows, tensors["pos_embed"]], axis=1)
    return tensors | {"cls_token": tensors["cls_token"] - rows, "pos_embed": position}


def as_dinov2(tensors):
    """Meta's file: blocks in chunks, a class row of positions, a token for masked patches."""
    tensors = with_rows(tensors, 1) | {"mask_token": np.ones((1, WIDTH), np.float32)}
    tensors["register_tokens"] = tensors.pop("reg_token")
    return {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): x for name, x in tensors.items()}


def as_refiner(tensors):
    position = tensors.pop("pos_embed").reshape(1, SIDE // PATCH, SIDE // PATCH, WIDTH)
    return tensors | {"cls_tokens.tokens": tensors.pop("cls_token"), "pos_embed.embed": position}


def as_pixio(tensors):
    """Pixio's own names, of those in transformers' code."""
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "attention.o_proj": "attn.proj", "layers": "blocks",
        "layernorm": "norm",
    }  # fmt: skip
    found = {}
    for name, x in tensors.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "q_proj" in name:
            three = [tensors[n] for n in tensors if re.sub("[qkv]_proj", "q_proj", n) == name]
            found[name] = three
        found[name] = x
    for name in [name for name in found if "q_proj" in name]:
        three = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("attention.q_proj", "attn.qkv")] = np.concatenate(three)
    return found


def as_ijepa(tensors):
    """Meta's file: the trained encoder, its average and the predictor."""

    def under(scale):
        return {f"module.{name}": scale * x for name, x in tensors.items()}

    predictor = {"module.predictor_embed.weight": torch.ones(3, 3)}
    return {"encoder": under(2), "target_encoder": under(1), "predictor": predictor, "epoch": 3}


class Kind(NamedTuple):
    peer: Callable  # makes it
    write: Callable  # writes its file: (peer, folder) -> path
    feature: Callable  # (peer, images) -> [B, D]
    tokens: tuple[int, int] = (1, 0)  # class tokens, registers
    format: str = "timm"  # in which it is written again
    pool: str = "cls"
    key: str | None = None


beit = partial(
    timm.models.beit.Beit, use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.1,
    qkv_bias=True,
)  # fmt: skip
gap = partial(timm_kind, class_token=False, global_pool="avg", fc_norm=False)
registers = partial(timm_kind, reg_tokens=4, no_embed_class=True, init_values=0.1)
distilled = partial(timm_kind, timm.models.deit.VisionTransformerDistilled)
absolute = dict(use_absolute_position_embeddings=True)
KINDS = {
    "MIM-Refiner": Kind(
        partial(timm_kind, no_embed_class=True), partial(write_timm, rename=as_refiner), of_timm
    ),
    "Pixio": Kind(partial(hf, "Pixio", n_cls_tokens=5), write_hf, pooled, (5, 0), "hf"),
    "Pixio's .pth": Kind(
        partial(hf, "Pixio", n_cls_tokens=5), partial(write_timm, rename=as_pixio, wrap=dict),
        pooled, (5, 0), "hf",
    ),
    "DINOv2, HuggingFace": Kind(partial(hf, "Dinov2"), write_hf, pooled, format="hf"),
    "DINOv2, timm": Kind(partial(timm_kind, init_values=0.1), write_timm, of_timm),
    "DINOv2 with registers, HuggingFace": Kind(
        partial(hf, "Dinov2WithRegisters"), write_hf, pooled, (1, 4), "hf"
    ),
    "DINOv2 with registers, timm": Kind(registers, write_timm, of_timm, (1, 4)),
    "DINOv2 with registers, Meta's .pth": Kind(
        registers, partial(write_timm, rename=as_dinov2, wrap=dict), of_timm, (1, 4)
    ),
    "registers with positions, timm": Kind(
        partial(timm_kind, reg_tokens=4), write_timm, of_timm, (1, 4)
    ),
    "I-JEPA, HuggingFace": Kind(partial(hf, "IJepa"), write_hf, mean, (0, 0), "hf", "mean"),
    "I-JEPA, timm": Kind(gap, write_timm, of_timm, (0, 0), "timm", "mean"),
    "I-JEPA, Meta's .pth": Kind(
        gap, partial(write_timm, wrap=as_ijepa), of_timm, (0, 0), "timm", "mean", "target_encoder"
    ),
    "ViT-MSN": Kind(partial(hf, "ViTMSN"), write_hf, first, format="hf"),
    "DeiT distilled, HuggingFace": Kind(partial(hf, "DeiT"), write_hf, first, (1, 1), "hf"),
    "DeiT distilled, timm": Kind(distilled, write_timm, of_timm, (2, 0)),
    "BEiT without relative positions, HuggingFace": Kind(
        partial(hf, "Beit", **absolute), write_hf, pooled, pool="fc_norm"
    ),
    "BEiT without relative positions, timm": Kind(
        partial(timm_kind, beit, global_pool="token"), write_timm, of_timm
    ),
}  # fmt: skip


def recognised(kind, peer, folder):
    eps = next(m.eps for m in peer.modules() if isinstance(m, torch.nn.LayerNorm))
    given = Overrides(heads=3, ln_eps=eps, key=kind.key)
    return importing.recognised([kind.write(peer, folder)], given)


def model_of(found):
    parts = found.read()
    encoder = SAVED[found.kind].encoder_params(parts)
    return exporting.Model(stage=found.kind, config=found.config, encoder=encoder, parts=parts)


def exported_peer(model, path, format):
    """The peer, loaded from what is written."""
    exporting.export(model, path, format)
    return loaded(path, format)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_kind_there_and_back(tmp_path, rng, kind):
    peer = kind.peer()
    found = recognised(kind, peer, tmp_path)
    model = found.config.model
    assert (model.cls_tokens, model.registers, model.pool) == (*kind.tokens, kind.pool)
    images = rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    want = kind.feature(peer, pixels(images))
    assert_close("kinds", features(found, images), want, FORWARD)
    again = exported_peer(model_of(found), tmp_path / "again.safetensors", kind.format)
    feature = kind.feature if kind.format == "hf" else of_timm
    assert_close("kinds, exported", feature(again, pixels(images)), want, FORWARD)
    if kind.key is None:  # no tensor is left out in silence
        (path,) = found.files
        used = {name for part in found.parts.values() for x in part.values() for name in x.names}
        ignored = re.findall(r"^  (\S+): ignored", "\n".join(found.described), re.MULTILINE)
        assert used | set(ignored) == set(tensors.read(path).tensors)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("Pixio", {}),
        ("DINOv2 with registers, HuggingFace", {}),
        ("DeiT distilled, HuggingFace", dict(interpolate_pos_encoding=True)),
    ],
)
def test_positions_for_another_size_are_those_of_transformers(tmp_path, rng, kind, own):
    kind, size = KINDS[kind], (24, 24)
    peer = kind.peer()
    path = kind.write(peer, tmp_path)
    found = importing.recognised([path], Overrides(image_size=size))
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    want = kind.feature(partial(peer, **own), pixels(images))
    assert_close("kinds, other size", features(found, images), want, FORWARD)


# What is refused, and what the error names.
REFUSED = {
    "a SwiGLU MLP": lambda: hf("Dinov2", use_swiglu_ffn=True),
    "a SwiGLU or an MLP of another width": lambda: timm_kind(
        mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=16 / 3
    ),
    "relative position biases": lambda: timm_kind(
        timm.models.beit.Beit, use_abs_pos_emb=True, use_rel_pos_bias=True
    ),
    "attention.relative_position_bias": lambda: hf("Beit", use_relative_position_bias=True),
    "'embeddings.position_embeddings' is missing": lambda: hf("Beit"),
    "norms of queries and keys": lambda: timm_kind(qk_norm=True),
    "a norm before the blocks": lambda: timm_kind(pre_norm=True),
}


@pytest.mark.parametrize(("message", "peer"), REFUSED.items(), ids=list(REFUSED))
def test_what_cannot_be_read_is_named(tmp_path, message, peer):
    peer = peer()
    write = write_hf if hasattr(peer, "save_pretrained") else write_timm
    with pytest.raises(UserError) as error:
        importing.recognised([write(peer, tmp_path)], Overrides(heads=3, ln_eps=1e-6))
    assert message in str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "registers" in kind])
def test_registers_without_positions_are_no_dinov3(tmp_path, kind):
    content = tensors.read(KINDS[kind].write(KINDS[kind].peer(), tmp_path))
    path = tmp_path / "lacking.safetensors"
    named = {x.names[0]: np.asarray(x) for x in content.tensors.values()}
    save_file({name: x for name, x in named.items() if "pos" not in name}, path)
    with pytest.raises(UserError, match=r"'(pos_embed|embeddings\.pos.*)' is missing"):
        importing.recognised([path], Overrides(heads=3, ln_eps=1e-6))


@pytest.mark.parametrize(
    "stated",
    [
        {"architecture": "vit_base_patch16_rpn_224"},
        {"architecture": "vit_base_patch32_siglip_gap_256"},
        {"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "quick_gelu"}},
    ],
)
def test_what_timm_says_of_a_network_and_no_tensor_does_is_read(tmp_path, stated):
    write_timm(gap(), tmp_path).rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"(architecture|act_layer) is .*, must be .*(GELU|gelu)"):
        importing.recognised([tmp_path], Overrides(heads=3, ln_eps=1e-6))


@pytest.mark.parametrize("lost", [r"\.key\.bias", r"\.(query|key|value)\.bias"])
def test_biases_that_a_config_states_are_no_zeros(tmp_path, lost):
    write_hf(hf("Dinov2"), tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {n: np.asarray(x) for n, x in tensors.read(path).tensors.items()}
    save_file({n: x for n, x in kept.items() if not re.search(lost, n)}, path)
    with pytest.raises(UserError, match=r"'encoder.layer.0.*key.bias' is missing; config has qkv"):
        importing.recognised([tmp_path])


def test_a_feature_of_the_class_token_needs_one(tmp_path):
    path = write_timm(gap(), tmp_path)
    with pytest.raises(UserError, match="pool='cls': the encoder has no class token"):
        importing.recognised([path], Overrides(heads=3, ln_eps=1e-6, pool="cls"))


@pytest.mark.parametrize(
    ("format", "section", "message"),
    [
        ("maect", dict(cls_tokens=3), "not 3 class tokens and 0 registers; use mae"),
        ("timm", dict(cls_tokens=3), "no model with 3 class tokens and 0 registers, feature cls"),
        ("timm", dict(cls_tokens=2, pool="mean"), "no model with 2 class tokens .* feature mean"),
        ("timm", dict(cls_tokens=2, rope_theta=100.0), "no model with 2 class tokens"),
        ("hf", dict(cls_tokens=3, registers=2), "no model with 3 class tokens and 2 registers"),
        ("hf", dict(registers=2, image_size=(16, 24)), r"images \(16, 24\); use mae"),
    ],
)
def test_a_format_without_a_place_is_refused_first(tmp_path, format, section, message):
    section = configs.load("mae_vitl16").model.to_dict() | section
    nothing = dict(stage="encoder", encoder={}, parts={"params": {}})
    model = exporting.Model(config=ConfigDict({"model": section}), **nothing)
    with pytest.raises(UserError, match=message):
        exporting.export(model, tmp_path / "x.safetensors", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["DeiT", "IJepa"])
def test_huggingfaces_classifiers_are_read_and_written(tmp_path, rng, name):
    config = getattr(transformers, f"{name}Config")(**HF, intermediate_size=4 * WIDTH, num_labels=5)
    peer = perturbed(getattr(transformers, f"{name}ForImageClassification")(config))
    peer.save_pretrained(tmp_path / "peer")
    found = importing.recognised([tmp_path / "peer"])
    images = rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    want = peer(pixels(images)).logits.detach().numpy()
    model = model_of(found)
    layer = model.parts["params"]["classifier"]
    scores = features(found, images) @ layer["kernel"] + layer["bias"]
    assert_close("kinds, scores", scores, want, FORWARD)
    if name == "IJepa":  # transformers has no classifier of a class token beside registers
        exporting.export(model, tmp_path / "out", "hf")
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        got = again.eval()(pixels(images)).logits.detach()
        assert_close("kinds, scores", got, want, FORWARD)


def test_the_classifiers_of_two_tokens_are_left_out_and_one_is_written_for_both(tmp_path, rng):
    path = write_timm(distilled(num_classes=5), tmp_path)
    found = importing.recognised([path], Overrides(heads=3, ln_eps=1e-6))
    said = "\n".join(found.described)
    assert all(f"  {head}.weight: ignored" in said for head in ("head", "head_dist"))
    assert found.kind == "encoder"
    # A classifier of the mean of both tokens, as fine-tuning trains it here.
    model = model_of(found)
    kernel, bias = rng.normal(size=(WIDTH, 5)).astype(np.float32), np.ones(5, np.float32)
    model.parts["params"]["classifier"] = {"kernel": kernel, "bias": bias}
    images = rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    peer = exported_peer(model, tmp_path / "out.safetensors", "timm")
    want = features(found, images) @ kernel + bias
    assert_close("kinds, scores", peer.eval()(pixels(images)).detach(), want, FORWARD)


def test_a_refined_encoder_is_written_without_its_heads(tmp_path, rng):
    kind, config = SAVED["refine"], configs.load(str(CONFIGS / "refine_vitl16.py:test"))
    state = jax.jit(kind.from_config(config, 512).init)(jax.random.key(0), {})
    parts = jax.device_get({field: getattr(state, field) for field in kind.saved})
    parts["ema"] = jax.tree.map(lambda x: x + np.float32(0.01), parts["ema"])
    encoder = kind.encoder_params(parts)
    model = exporting.Model(stage="refine", config=config, encoder=encoder, parts=parts)
    images = rng.normal(size=(2, 28, 28, 1)).astype(np.float32)
    want = vit.features(vit.from_config(config.model), encoder, images, "cls")
    for format, feature in (("timm", of_timm), ("hf", pooled)):
        peer = exported_peer(model, tmp_path / f"{format}.safetensors", format)
        assert_close("kinds, refined", feature(peer, pixels(images)), want, FORWARD)
    path = tmp_path / "refined.th"
    written = exporting.export(model, path, "maect")
    assert written[:2] == [str(path), f"{path}.md"]
    assert "heads are left out" in written[2]
    assert "cls_tokens.tokens" in torch.load(path)["state_dict"]
    found = importing.recognised([path], Overrides(heads=2, ln_eps=1e-6))
    assert_close("kinds, refined", features(found, images), want, FORWARD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "formats"),
    [
        (dict(cls_tokens=3), ("mae", "hf")),
        (dict(registers=4), ("mae", "timm")),
        (dict(cls_tokens=0), ("mae", "timm")),
        (dict(registers=4, rope_theta=100.0), ("hf", "timm")),
        (dict(post_norm=True), ("maect",)),
    ],
    ids=["class tokens", "registers", "no class token", "rotary positions", "post-norm"],
)
def test_heads_tuning_and_protocols_take_any_kind(tmp_path, monkeypatch, own, formats):
    """From a file by head and ct to every protocol, and out again, with the file's feature."""
    module = vit.ViT(32, 2, 2, 7, **own)
    feature = "cls" if module.cls_tokens else "mean"
    params = module.init(jax.random.key(0), np.zeros((1, 28, 28, 1)))["params"]
    grid = (4, 4) if module.rope_theta is None else None
    encoder = names.encoder_to_torch(jax.device_get(params), 7, grid)
    path, run, rng = tmp_path / "w.safetensors", tmp_path / "run", np.random.default_rng(0)
    stated = {"num_attention_heads": "2", "layer_norm_eps": "1e-6", "image_size": "[28, 28]"}
    if module.rope_theta is not None:
        stated["rope_theta"] = "100.0"
    tensors.write(path, encoder, metadata=stated)
    label = np.arange(160) % 4
    image = (60 * label[:, None, None] + rng.integers(0, 60, (160, 28, 28))).astype(np.uint8)
    np.savez(tmp_path / "set.npz", image=image, label=label, is_test=np.arange(160) >= 128)
    small = ["batch_size=32", "queue_size=32", "top_k=1"]
    settings = [
        f"init_from={path}", "data.source=folder", f"data.path={tmp_path / 'set.npz'}",
        f"eval.protocols={tuple(ON_REQUEST)}", "eval.knn.k=(1,)", "eval.probe.epochs=1",
        "eval.probe.batch_size=32", "eval.probe.base_lrs=(0.1,)", "eval.cluster.runs=1",
        "eval.lowshot.splits=1", "eval.lowshot.images=(1,)", "eval.lowshot.shares=()",
        "eval.batch_size=32", "monitor.every=0", "head.epochs=1", "ct.epochs=1",
        "ct.frozen_blocks=1",
        *(f"{stage}.{one}" for stage in ("head", "ct") for one in small),
    ]  # fmt: skip
    config = configs.load(str(CONFIGS / "tune_my_images.py:test"), settings)
    run_on(monkeypatch, (1, 1), config, run, report=False)
    model = read_run(run)
    section = model.config.model
    assert section.pool == feature
    assert all(section[key] == getattr(module, key) for key in vit.KIND)
    results = json.loads((run / "results.json").read_text())
    assert set(ON_REQUEST) <= results["ct"].keys()
    for name in model.encoder.keys() & {"cls_token", "register_token", "embed_norm"}:
        assert_trees_equal(model.encoder[name], params[name])  # frozen
    images = rng.normal(size=(2, 28, 28, 1)).astype(np.float32)
    want = vit.features(module, model.encoder, images, feature)
    feature_of = {"hf": pooled, "timm": of_timm}
    for format in formats:
        exported = tmp_path / f"{format}.safetensors"
        if format in feature_of:
            peer = exported_peer(model, exported, format)
            got = feature_of[format](peer, pixels(images))
            assert_close("kinds, tuned", got, want, FORWARD)
        else:
            exporting.export(model, exported, format)
        found = importing.recognised([exported], Overrides(pool=feature))
        assert_close("kinds, tuned", features(found, images), want, FORWARD)
