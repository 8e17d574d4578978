"""Files with more than a model in them, and models under other names than their own."""

import json

import numpy as np
import pytest

from maect_jax import load_encoder
from maect_jax.convert import importing, names, tensors
from maect_jax.errors import UserError
from maect_jax.run import lineage
from tests.helpers.common import assert_trees_equal
from tests.helpers.foreign_files import CT, MAE, mae_file, stated, with_class_row

ENCODER = CT.under("init/encoder/")
OTHER = {name: x * 2 if name.startswith("blocks") else x for name, x in ENCODER.items()}


def under(prefix, found):
    return {f"{prefix}{name}": x for name, x in found.items()}


def params_of(*paths, **given):
    return importing.recognised(paths, stated(CT, **given)).read()["params"]["encoder"]


@pytest.mark.parametrize(
    "prefix", ["module.", "module._orig_mod.", "model.encoder.", "teacher.backbone.", "0."]
)
def test_a_prefix_is_stripped_and_what_is_beside_it_left_out(file, prefix):
    want = params_of(file(ENCODER))
    beside = {"head.mlp.0.weight": np.zeros((2, 2), np.float32), "loss.centre": np.zeros(2)}
    found = importing.recognised([file(under(prefix, ENCODER) | beside)], stated(CT))
    assert_trees_equal(found.read()["params"]["encoder"], want)
    stripped, left = found.notes
    assert f"{prefix!r} of {len(ENCODER)} tensors" in stripped
    assert left.endswith("head (1), loss (1)")
    assert found.described[1:3] == found.notes


def test_wrappers_inside_of_names_and_heads_of_pre_training_are_passed_over(file):
    inner = {n.replace("blocks.0.", "blocks.0._orig_mod."): x for n, x in ENCODER.items()}
    head = {f"head.{i}.weight": np.zeros((2, 2), np.float32) for i in (0, 1, 3)}
    found = importing.recognised([file(inner | head)], stated(CT))
    assert found.kind == "encoder"
    assert_trees_equal(found.read()["params"]["encoder"], params_of(file(ENCODER)))
    assert "strips '_orig_mod' inside" in found.notes[0]
    assert "  head.3.weight: ignored" in "\n".join(found.described)


def test_a_run_that_starts_from_a_file_says_what_it_passes_over(file, caplog):
    path = file(under("ema.", OTHER) | under("model.", mae_file(MAE)))
    with pytest.raises(UserError, match="--heads"):
        lineage.SavedFiles(str(path))
    lineage.SavedFiles(str(path), stated(MAE))
    assert "takes 'model'; also there: 'ema'" in caplog.text
    with pytest.raises(UserError, match="is none of"):
        load_encoder(path, key="ema")
    size = dict(heads=CT.meta["heads"], ln_eps=1e-6)
    assert load_encoder(path, key="ema", **size).width == CT.meta["width"]
    with pytest.raises(UserError, match="key 'x' names no model"):
        load_encoder(path, key="x", **size)


@pytest.mark.parametrize(
    ("taken", "passed"),
    [("state_dict_ema", "state_dict"), ("model_ema.module", "model"), ("state_dict", "model"),
     ("state_dict", "ema"), ("model", "ema_model.module")],
)  # fmt: skip
def test_of_several_models_timms_choice_is_taken_and_told(file, taken, passed):
    path = file(under(f"{taken}.", ENCODER) | under(f"{passed}.", OTHER))
    want, other = params_of(file(ENCODER, "one")), params_of(file(OTHER, "two"))
    found = importing.recognised([path], stated(CT))
    assert_trees_equal(found.read()["params"]["encoder"], want)
    assert f"takes '{taken}'; also there: '{passed}'" in found.notes[0]
    assert found.origin()[0]["key"] == taken
    assert_trees_equal(params_of(path, key=passed), other)


@pytest.mark.parametrize(
    ("first", "second"),
    [("student.", "teacher."), ("encoder.", "target_encoder."), ("", "momentum_encoder."),
     ("state_dict.model.", "state_dict.model_ema.module.")],
)  # fmt: skip
def test_where_nothing_says_which_model_all_are_listed(file, first, second):
    path = file(under(first, ENCODER) | under(second, OTHER))
    with pytest.raises(UserError, match=r"holds 2 models.*--key=NAME") as error:
        importing.recognised([path], stated(CT))
    assert f"{first[:-1]!r}, {second[:-1]!r}" in str(error.value)
    for prefix, own in ((first, ENCODER), (second, OTHER)):
        assert_trees_equal(params_of(path, key=prefix[:-1]), params_of(file(own, "own")))
    with pytest.raises(UserError, match=f"key 'x' names no model.* has '{first[:-1]}', "):
        importing.recognised([path], stated(CT, key="x"))


def test_a_key_chooses_in_the_file_that_has_it(file):
    head = file(CT.under("init/head/"), "head")
    both = file(under("student.", OTHER) | under("teacher.", ENCODER), "both")
    origin = importing.recognised([head, both], stated(CT, key="teacher")).origin()
    assert [entry.get("key") for entry in origin] == [None, "teacher"]


def test_an_mae_without_its_decoder_is_an_encoder(file):
    whole = mae_file(MAE)
    rest = {n: x for n, x in whole.items() if not n.startswith("decoder")}
    for own in (rest, rest | {"decoder_pos_embed": whole["decoder_pos_embed"]}):
        found = importing.recognised([file(own)], stated(MAE))
        assert found.kind == "encoder"
        assert "  mask_token: ignored" in "\n".join(found.described)
    damaged = rest | {"decoder_embed.bias": whole["decoder_embed.bias"]}
    with pytest.raises(UserError, match=r"the decoder's tensor 'decoder_embed\.weight' is missing"):
        importing.recognised([file(damaged)], stated(MAE))


def hf_file(case):
    own = case.under("init/encoder/")
    own |= {"pos_embed": with_class_row(own["pos_embed"])}
    return under("model.vit.", names.to_files(own, "encoder", "hf"))


@pytest.mark.parametrize(
    "lost",
    ["encoder.layer.0.attention.attention.key.bias", "encoder.layer.1.output.dense.weight",
     "encoder.layer.1.layernorm_before.bias", "embeddings.cls_token", "layernorm.weight"],
)  # fmt: skip
def test_what_is_missing_has_the_name_that_the_file_would_give_it(file, lost):
    found = hf_file(CT)
    del found[f"model.vit.{lost}"]
    with pytest.raises(UserError, match=f"'model.vit.{lost}' is missing"):
        importing.recognised([file(found)], stated(CT))


def test_what_is_wrong_with_the_second_file_names_that_file(file):
    encoder, head = file(ENCODER), CT.under("init/head/")
    lost, bent = "predictor.3.weight", head | {"projector.1.bias": np.zeros(3, np.float32)}
    for own, message in (
        ({n: x for n, x in head.items() if n != lost}, f"the head's tensor '{lost}' is missing"),
        (bent, "'projector.1.bias' has shape"),
        (head | {"queue": np.zeros((0, 4), np.float32)}, "'queue' has shape .* none .* empty"),
    ):
        with pytest.raises(UserError, match=rf"/head: {message}"):
            importing.recognised([encoder, file(own, "head")], stated(CT))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"weights.pth".ljust(257, b"\0") + b"ustar", "tar"),
        (b"PK\x03\x04" + bytes(60), "cut short"),
        (b"weights", "starts with b'weights'"),
    ],
)
def test_what_is_no_file_of_weights_is_recognised_by_its_content(tmp_path, start, message):
    for ending in ("pth", "safetensors", "PTH"):
        path = tmp_path / f"weights.{ending}"
        path.write_bytes(start)
        with pytest.raises(UserError, match=message) as error:
            importing.recognised([path])
        assert str(error.value).startswith(f"{path}: ")


def test_a_file_is_what_it_holds_whatever_its_name(file, tmp_path):
    want = params_of(file(ENCODER))
    for name in ("x.pth.tar", "x.PTH", "x.ckpt", "x", "x.npz"):
        assert_trees_equal(params_of(file(ENCODER, name)), want)
        assert importing.is_file(str(tmp_path / name))
    np.savez(tmp_path / "y.pth", **ENCODER)
    (tmp_path / "y.pth.npz").rename(tmp_path / "y.pth")
    with pytest.raises(UserError, match="NumPy's archive"):
        importing.recognised([tmp_path / "y.pth"])


def test_what_is_stated_has_the_name_of_its_place(tmp_path):
    folder = tmp_path / "hf"
    tensors.write(folder / "model.safetensors", hf_file(CT))
    (folder / "pytorch_model.bin").write_bytes(b"")
    config = {"num_attention_heads": CT.meta["heads"], "layer_norm_eps": 1e-6, "hidden_size": 7}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"hidden_size is 7, must be"):
        importing.recognised([folder])
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": CT.meta["width"]}))
    found = importing.recognised([folder])
    assert "not pytorch_model.bin beside it" in found.described[0]
    with pytest.raises(UserError, match=r"heads is -2, must be"):
        importing.recognised([folder], stated(CT, heads=-2))


def test_another_model_of_the_same_file_is_another_start(tmp_path):
    """As of a version that took another one in silence."""
    noted = {"file": "a.pth", "layout": "timm", "sha256": "x"}
    lineage.write_lineage(tmp_path, [noted])
    lineage.write_lineage(tmp_path, [noted])
    with pytest.raises(UserError, match="now it would be teacher"):
        lineage.write_lineage(tmp_path, [noted | {"key": "teacher"}])
    assert lineage.read_lineage(tmp_path) == [noted]
