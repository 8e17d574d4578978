"""Files from elsewhere: recognised, checked, read as runs, and written again. Without PyTorch."""

import json

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from maect_jax import sharding
from maect_jax.convert import exporting, importing, names, tensors
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from maect_jax.run import checkpoints, lineage
from maect_jax.stages import STAGES
from tests.helpers.common import assert_trees_equal
from tests.helpers.foreign_files import (
    CT,
    MAE,
    assert_same,
    flags,
    mae_file,
    run_convert,
    stated,
    with_class_row,
)


def test_an_mae_goes_in_and_out_bit_equal(file, tmp_path, monkeypatch, capsys):
    want, run = mae_file(MAE), tmp_path / "run"
    run_convert(monkeypatch, "import", file(want), run, *flags(MAE))
    said = capsys.readouterr().out
    assert "MAE's (with decoder) names" in said
    assert "kind       mae: encoder + decoder" in said
    assert "blocks.*.mlp.fc1 -> encoder blocks.*.mlp.fc1 (bias, weight)" in said
    run_convert(monkeypatch, "export", run, tmp_path / "again.safetensors", "--format=mae")
    assert_same(load_file(tmp_path / "again.safetensors"), want)
    card = (tmp_path / "again.safetensors.md").read_text()
    assert "weights.safetensors" in card
    assert "CC BY-NC 4.0" in card
    # What is written tells of itself what tensors do not.
    found = importing.recognised([tmp_path / "again.safetensors"])
    assert build_size(found) == (MAE.meta["width"], MAE.meta["depth"], MAE.meta["heads"])
    assert found.config.mae.decoder.heads == MAE.meta["dec_heads"]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_export_says_what_its_feature_and_its_images_are(tmp_path, monkeypatch, pool):
    source, run, statistics = tmp_path / "source", tmp_path / "run", {"mean": 0.25, "std": 0.5}
    source.mkdir()
    save_file(mae_file(MAE), source / "model.safetensors")
    processor = {f"image_{key}": [x] * 3 for key, x in statistics.items()}
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    run_convert(monkeypatch, "import", source, run, *flags(MAE), f"--pool={pool}")
    for format in exporting.FORMATS:
        path = tmp_path / f"{format}.safetensors"
        run_convert(monkeypatch, "export", run, path, f"--format={format}")
        found = importing.recognised([path]).config
        assert found.model.pool == pool, format
        assert found.data.to_dict() == {k: (x,) * 3 for k, x in statistics.items()}, format


def test_an_mae_with_several_tokens_goes_in_and_out_bit_equal(file, tmp_path, monkeypatch):
    want, run, out = mae_file(MAE), tmp_path / "run", tmp_path / "again.safetensors"
    want["cls_token"] = np.concatenate([want["cls_token"], 2 * want["cls_token"]], axis=1)
    want["register_tokens"] = 3 * want["cls_token"]
    for name in ("pos_embed", "decoder_pos_embed"):  # a row a class token, none for registers
        want[name] = with_class_row(want[name])
    run_convert(monkeypatch, "import", file(want), run, *flags(MAE))
    run_convert(monkeypatch, "export", run, out, "--format=mae")
    assert_same(load_file(out), want)
    model = importing.recognised([out]).config.model
    assert (model.cls_tokens, model.registers) == (2, 2)


def build_size(found):
    model = found.config.model
    variant = vit.VARIANTS[model.variant]
    return tuple(model[key] or getattr(variant, key) for key in ("width", "depth", "heads"))


def test_the_class_tokens_position_is_added_to_it(file, tmp_path):
    found = importing.recognised([file(mae_file(MAE, row=0.5))], stated(MAE)).read()
    want = MAE["encoder/cls_token"] + np.float32(0.5)
    np.testing.assert_array_equal(found["params"]["encoder"]["cls_token"], want)
    learned = mae_file(MAE)
    learned["decoder_pos_embed"][:, 0] = 1
    with pytest.raises(UserError, match="has a row for the class token that is not zero"):
        importing.recognised([file(learned)], stated(MAE))  # before anything is written


def test_an_authors_encoder_and_head_go_in_and_out_bit_equal(file, tmp_path, monkeypatch):
    encoder, head = CT.under("init/encoder/"), CT.under("init/head/")
    run = tmp_path / "run"
    paths = file(encoder, "encoder.safetensors"), file(head, "head.safetensors")
    run_convert(monkeypatch, "import", *paths, run, *flags(CT))
    out = tmp_path / "out.safetensors"
    run_convert(monkeypatch, "export", run, out, "--format=maect")
    assert_same(load_file(out), encoder)
    counters = {name for name in head if name.endswith("num_batches_tracked")}
    want = {name: x for name, x in head.items() if name not in counters}
    assert_same(load_file(tmp_path / "out_head.safetensors"), want)
    # Tuning goes on from it, head and queue as they are.
    found = lineage.find(str(run), "ct")
    assert found.stage == "ct"
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    start = lineage.start(found, found.config.model, stage=STAGES["ct"], mesh=mesh)
    np.testing.assert_array_equal(start["predictor"]["fc2"]["kernel"].T, head["predictor.3.weight"])
    np.testing.assert_array_equal(np.sort(start["queue"].ids, None), np.sort(head["queue_id"]))


@pytest.mark.parametrize(
    ("change", "pool"),
    [
        (lambda t: None, "mean"),
        (lambda t: t.update({name: x.astype(np.float16) for name, x in t.items()}), "mean"),
        (lambda t: t.update({"pos_embed": t["pos_embed"] + np.float32(0.1)}), "cls"),
        (lambda t: t.update({"head.weight": np.zeros((3, 768), np.float32),
                             "head.bias": np.zeros(3, np.float32)}), "cls"),
        (lambda t: t.update({f"fc_norm.{k}": t.pop(f"norm.{k}") for k in ("weight", "bias")}),
         "fc_norm"),
    ],
    ids=["MAE", "half precision", "learned positions", "classifier", "fc_norm"],
)  # fmt: skip
def test_the_feature_of_a_vit_b_is_the_papers_for_an_mae_alone(file, change, pool):
    module = vit.ViT(width=768, depth=1, heads=12, patch_size=2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 4, 4, 3)))["params"]
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    own = names.encoder_to_torch(params, 2, (2, 2))
    change(own)
    assert importing.recognised([file(own)]).config.model.pool == pool


def test_weights_in_parts_are_one_model_and_nothing_outside_their_folder(tmp_path):
    folder, own = tmp_path / "hf", CT.under("init/encoder/")
    own |= {"pos_embed": with_class_row(own["pos_embed"])}
    hf = {f"vit.{name}": x for name, x in names.to_files(own, "encoder", "hf").items()}
    halves = [dict(list(hf.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        tensors.write(folder / f"model-{i}.safetensors", half)
    places = {n: f"model-{i}.safetensors" for i, half in enumerate(halves) for n in half}
    index = folder / "model.safetensors.index.json"
    config = {"num_attention_heads": CT.meta["heads"], "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    index.write_text(json.dumps({"weight_map": places}))
    found = importing.recognised([folder])
    assert_trees_equal(
        found.read()["params"]["encoder"],
        importing.recognised([folder], stated(CT)).read()["params"]["encoder"],
    )
    before = found.origin()[0]["sha256"]
    changed = {n: x + 1 for n, x in halves[1].items()}
    tensors.write(folder / "model-1.safetensors", changed)
    assert importing.recognised([folder]).origin()[0]["sha256"] != before
    for bad in ({"x": "../hf/model-0.safetensors"}, {"x": 3}, ["x"], {"x": "absent.safetensors"}):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(UserError, match=r"weight_map|is not beside it"):
            importing.recognised([folder])


def test_exports_replace_nothing_and_leave_nothing_half(file, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    run_convert(monkeypatch, "import", file(mae_file(MAE)), run, *flags(MAE))
    out.mkdir()
    (out / "mine.safetensors.md").write_text("my notes")
    monkeypatch.setattr(exporting.tensors, "save_file", full_disk)
    full = "cannot write there: No space left"
    for name, form, message in (
        ("mine.safetensors", "mae", r"mine\.safetensors\.md: exists already"),
        ("new.safetensors", "timm", full),
        ("hf", "hf", full),
    ):
        with pytest.raises(UserError, match=message):
            run_convert(monkeypatch, "export", run, out / name, f"--format={form}")
    assert [path.name for path in out.iterdir()] == ["mine.safetensors.md"]
    assert (out / "mine.safetensors.md").read_text() == "my notes"


def full_disk(*_, **__):
    raise SafetensorError("No space left on device\nand more")


def test_an_import_touches_no_folder_but_its_own(file, tmp_path, monkeypatch):
    (tmp_path / "run.tmp").mkdir()
    (tmp_path / "run.tmp" / "mine").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    path = file(mae_file(MAE))
    with pytest.raises(UserError, match="taken: exists already"):
        run_convert(monkeypatch, "import", path, tmp_path / "taken", *flags(MAE))

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", fail)
        with pytest.raises(UserError):
            run_convert(patch, "import", path, tmp_path / "run", *flags(MAE))
    names_of = {one.name for one in tmp_path.iterdir()}
    assert names_of == {"run.tmp", "taken", path.name}
    run_convert(monkeypatch, "import", path, tmp_path / "run", *flags(MAE))
    assert (tmp_path / "run.tmp" / "mine").exists()


def test_another_image_size_resizes_the_positions(file):
    path = file(CT.under("init/encoder/"))
    larger = tuple(2 * side for side in CT.image_size)
    # The grid in the file is a square one, so that it is known.
    assert CT.grid[0] == CT.grid[1]
    found = importing.recognised([path], stated(CT, image_size=larger))
    assert "resized (bicubic) from" in "\n".join(found.described)
    want = positions.resize(CT["init/encoder/pos_embed"][0], CT.grid, tuple(2 * g for g in CT.grid))
    np.testing.assert_array_equal(found.read()["params"]["encoder"]["pos_embed"], want)


def test_the_grid_in_a_file_is_not_the_one_that_is_asked_for(file):
    """Images of another shape with as many patches: the fixed positions tell the file's grid."""
    height, width = CT.image_size
    asked = (height // 2, width * 2)
    found = importing.recognised([file(CT.under("init/encoder/"))], stated(CT, image_size=asked))
    grid = CT.grid[0] // 2, CT.grid[1] * 2
    want = positions.resize(CT["init/encoder/pos_embed"][0], CT.grid, grid)
    np.testing.assert_array_equal(found.read()["params"]["encoder"]["pos_embed"], want)


def test_a_pool_that_is_given_replaces_an_unknown_one(tmp_path):
    found = {n: np.ascontiguousarray(x) for n, x in CT.under("init/encoder/").items()}
    save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"global_pool": "avgmax"}))
    assert importing.recognised([tmp_path], stated(CT, pool="mean")).config.model.pool == "mean"
    with pytest.raises(UserError, match="global_pool is 'avgmax'"):
        importing.recognised([tmp_path], stated(CT, pool=None))
