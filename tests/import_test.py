"""Files from elsewhere: recognised, checked, read as runs, and written again. Without PyTorch."""

import contextlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import maect_jax
from maect_jax import config as pages
from maect_jax import origin, sharding
from maect_jax.convert import exporting, importing, names, tensors
from maect_jax.convert.__main__ import main as convert
from maect_jax.convert.recognise import Given
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from tests import figures
from tests.conftest import CONFIGS, ROOT, SMALL, assert_trees_equal, run_on

MAE, CT = figures.cases("mae")[0], figures.cases("ct")[0]


def told(case, **own):
    """What the golden figures' odd widths do not tell."""
    decoder = case.meta.get("dec_heads")
    found = Given(case.meta["heads"], decoder, 1e-6, case.image_size, "cls", "float32")
    return found if not own else Given(**{**vars(found), **own})


def flags(case):
    height, width = case.image_size
    found = [f"--heads={case.meta['heads']}", "--ln_eps=1e-6", "--dtype=float32", "--pool=cls"]
    found.append(f"--image_size={height},{width}")
    return found + (
        [f"--decoder_heads={case.meta['dec_heads']}"] if "dec_heads" in case.meta else []
    )


def run_convert(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert()


def with_class_row(x, row=0.0):
    return np.concatenate([np.full_like(x[:, :1], row), x], axis=1)


def mae_file(case, row=0.0):
    """The tensors of an MAE as its own code names them."""
    encoder, decoder = case.under("encoder/"), case.under("decoder/")
    encoder["pos_embed"] = with_class_row(encoder["pos_embed"], row)
    decoder["pos_embed"] = with_class_row(decoder["pos_embed"])
    named = {n if n == "mask_token" else f"decoder_{n}": x for n, x in decoder.items()}
    return encoder | named


@pytest.fixture
def file(tmp_path):
    """Writes tensors, returns the path."""

    def write(found, name="weights.safetensors"):
        save_file({n: np.ascontiguousarray(x) for n, x in found.items()}, tmp_path / name)
        return tmp_path / name

    return write


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_an_mae_goes_in_and_out_bit_equal(file, tmp_path, monkeypatch, capsys):
    want, run = mae_file(MAE), tmp_path / "run"
    run_convert(monkeypatch, "import", file(want), run, *flags(MAE))
    said = capsys.readouterr().out
    assert "MAE's (with decoder) names" in said
    assert "kind       mae: encoder + decoder" in said
    assert "blocks.*.mlp.fc1 -> encoder blocks.*.mlp.fc1 (bias, weight)" in said
    run_convert(monkeypatch, "export", run, tmp_path / "again.safetensors", "--format=mae")
    assert_same(load_file(tmp_path / "again.safetensors"), want)
    card = (tmp_path / "again.md").read_text()
    assert "weights.safetensors" in card
    assert "CC BY-NC 4.0" in card
    # What is written tells of itself what tensors do not.
    found = importing.recognised([tmp_path / "again.safetensors"])
    assert build_size(found) == (MAE.meta["width"], MAE.meta["depth"], MAE.meta["heads"])
    assert found.config.mae.decoder.heads == MAE.meta["dec_heads"]


def build_size(found):
    model = found.config.model
    variant = vit.VARIANTS[model.variant]
    return tuple(model[key] or getattr(variant, key) for key in ("width", "depth", "heads"))


def test_the_class_tokens_position_is_added_to_it(file, tmp_path):
    found = importing.recognised([file(mae_file(MAE, row=0.5))], told(MAE)).read()
    want = MAE["encoder/cls_token"] + np.float32(0.5)
    np.testing.assert_array_equal(found["params"]["encoder"]["cls_token"], want)
    learned = mae_file(MAE)
    learned["decoder_pos_embed"][:, 0] = 1
    with pytest.raises(UserError, match="has a row for the class token that is not zero"):
        importing.recognised([file(learned)], told(MAE))


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
    found = origin.find(str(run), "ct")
    assert found.saved.stage == "ct"
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    start = found.start(found.saved.config.model, "ct", mesh)
    np.testing.assert_array_equal(start["predictor"]["fc2"]["kernel"].T, head["predictor.3.weight"])
    np.testing.assert_array_equal(np.sort(start["queue"].ids, None), np.sort(head["queue_id"]))


def broken(change):
    found = CT.under("init/encoder/")
    change(found)
    return found


def reshaped(found):
    found["blocks.1.mlp.fc2.bias"] = np.zeros(5, np.float32)


# What is wrong with a file, by what the error says.
WRONG = {
    "the encoder's tensor 'blocks.1.attn.qkv.bias' is missing": broken(
        lambda t: t.pop("blocks.1.attn.qkv.bias")
    ),
    "'blocks.1.mlp.fc2.bias' has shape (5,), must be": broken(reshaped),
    "no place for the tensor 'blocks.0.ls1.gamma'": broken(
        lambda t: t.update({"blocks.0.ls1.gamma": np.zeros(3, np.float32)})
    ),
    "none of the kinds that can be read": {"conv1.weight": np.zeros((3, 3), np.float32)},
    "holds a contrastive head of MAE-CT's authors, and no encoder; name the encoder with it": (
        CT.under("init/head/")
    ),
    "the tensor 'patch_embed.proj.weight' is missing": broken(
        lambda t: [t.pop("patch_embed.proj.weight"), t.update(
            {"decoder_embed.weight": np.zeros((4, 4), np.float32)})]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("message", "found"), WRONG.items(), ids=list(WRONG))
def test_what_is_no_whole_model_is_one_clear_line(file, message, found):
    with pytest.raises(UserError) as error:
        importing.recognised([file(found)], told(CT))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_file_does_not_tell_is_asked_for(file, tmp_path):
    path = file(CT.under("init/encoder/"))
    with pytest.raises(UserError, match=r"none of the known ones .* with --heads and --ln_eps"):
        importing.recognised([path])
    with pytest.raises(UserError, match=r"patch size, .*, which cannot be changed"):
        importing.recognised([path], told(CT, image_size=(17, 17)))
    with pytest.raises(UserError, match="another encoder; one file of each"):
        importing.recognised([path, path], told(CT))
    without = CT.under("init/encoder/")
    del without["pos_embed"]
    with pytest.raises(UserError, match=r"no position embedding.*--image_size=HEIGHT,WIDTH"):
        importing.recognised([file(without)], told(CT, image_size=None))
    with pytest.raises(UserError, match="there is no such file"):
        importing.recognised([tmp_path / "absent.safetensors"])
    (tmp_path / "notes.txt").write_text("weights")
    with pytest.raises(UserError, match="not a file of tensors by its name"):
        importing.recognised([tmp_path / "notes.txt"])


def test_nothing_is_written_of_what_cannot_be_read(file, tmp_path, monkeypatch, capsys):
    path = file(CT.under("init/encoder/"))
    path.write_bytes(path.read_bytes()[:-100])  # a download that was cut short
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        run_convert(monkeypatch, "import", path, run, *flags(CT))
    assert "not a whole safetensors file" in capsys.readouterr().err
    assert not run.exists()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_files_never_end_in_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "weights.safetensors"
    save_file({n: np.ascontiguousarray(x) for n, x in CT.under("init/encoder/").items()}, path)
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    # Whole tensors may still be there, whatever their numbers.
    with contextlib.suppress(UserError):
        importing.recognised([path], told(CT)).read()


def test_another_image_size_resizes_the_positions(file):
    path = file(CT.under("init/encoder/"))
    larger = tuple(2 * side for side in CT.image_size)
    # The grid in the file is a square one, so that it is known.
    assert CT.grid[0] == CT.grid[1]
    found = importing.recognised([path], told(CT, image_size=larger))
    assert "resized (bicubic) from" in "\n".join(found.described)
    want = positions.resize(CT["init/encoder/pos_embed"][0], CT.grid, tuple(2 * g for g in CT.grid))
    np.testing.assert_array_equal(found.read()["params"]["encoder"]["pos_embed"], want)


def test_a_file_is_evaluated_under_its_name_with_its_classifier(file, tmp_path, monkeypatch, rng):
    """`init_from=FILE` on the evaluation's page: an encoder and a probe of the packaged images."""
    width, model = 32, dict(width=32, depth=2, heads=2, patch_size=7)
    params = vit.ViT(**model).init(jax.random.key(0), np.zeros((1, 28, 28, 1)))["params"]
    encoder = names.encoder_to_torch(jax.device_get(params), 7, (4, 4))
    probe = {
        "layer.1.running_mean": rng.normal(size=width).astype(np.float32),
        "layer.1.running_var": rng.uniform(0.5, 2, width).astype(np.float32),
        "layer.1.num_batches_tracked": np.int64(5)[None],
        "layer.2.weight": rng.normal(size=(12, width)).astype(np.float32),
        "layer.2.bias": rng.normal(size=12).astype(np.float32),
    }
    tensors.write(tmp_path / "vit7.safetensors", encoder, about={
        "num_attention_heads": "2", "layer_norm_eps": "1e-6"})  # fmt: skip
    both = f"{tmp_path / 'vit7.safetensors'},{file(probe, 'probe.safetensors')}"
    settings = (f"init_from={both}", "eval.protocols=('knn',)", "data.train_split=train[80%:]",
                "monitor.every=0", "eval.dtype=float32")  # fmt: skip
    workdir = tmp_path / "eval"
    run_on(monkeypatch, (1, 2), pages.load(str(CONFIGS / "eval.py:test"), settings), workdir)
    results = json.loads((workdir / "results.json").read_text())
    assert list(results) == ["vit7"]
    x, labels = (np.load(workdir / f"features/vit7/val/{n}.npy") for n in ("x", "labels"))
    normal = (x - probe["layer.1.running_mean"]) / np.sqrt(probe["layer.1.running_var"] + 1e-5)
    scores = normal @ probe["layer.2.weight"].T + probe["layer.2.bias"]
    found = results["vit7"]["classifier"]
    assert found["top1"] == pytest.approx((scores.argmax(1) == labels).mean(), abs=1e-3)
    assert (found["classes"], found["images"]) == (12, len(labels))
    origins = json.loads((workdir / "origin.json").read_text())["from"]
    assert [entry["file"] for entry in origins] == ["vit7.safetensors", "probe.safetensors"]
    assert len(origins[0]["sha256"]) == 64


def test_load_encoder_takes_pixels_as_they_come(file, tmp_path, rng):
    path = tmp_path / "encoder.safetensors"
    about = {"num_attention_heads": str(CT.meta["heads"]), "layer_norm_eps": "1e-6"}
    tensors.write(path, CT.under("init/encoder/"), about=about)
    encoder = maect_jax.load_encoder(path, image_size=CT.image_size, pool="mean")
    pixels = rng.integers(0, 256, (3, *CT.image_size, 3), dtype=np.uint8)
    got = encoder(pixels)
    assert got.shape == (3, encoder.width) == (3, CT.meta["width"])
    np.testing.assert_allclose(encoder(pixels / np.float32(255)), got, rtol=1e-5, atol=1e-5)
    params = importing.recognised([path], told(CT)).read()["params"]["encoder"]
    module = vit.ViT(CT.meta["width"], CT.meta["depth"], CT.meta["heads"], CT.meta["patch_size"])
    x = (pixels / 255 - np.array(encoder.mean)) / np.array(encoder.std)
    want = vit.pool(module.apply({"params": params}, x.astype(np.float32)), "mean")
    figures.assert_close("load_encoder", got, want, figures.FORWARD)
    with pytest.raises(ValueError, match=r"images of shape \(3, 5, 5, 3\): must be \(B, "):
        encoder(np.zeros((3, 5, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="images of int64: must be uint8"):
        encoder(np.zeros((3, *CT.image_size, 3), int))


PEAK = """
import resource, sys
from maect_jax.convert import __main__, exporting
import jax; jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.argv = ["convert", *sys.argv[1:]]
__main__.main()
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_an_import_takes_less_memory_than_twice_the_file(tmp_path, rng):
    """An encoder of 225 MB, random and of no known width."""
    path, model = tmp_path / "large.safetensors", dict(width=640, depth=11, heads=10, patch_size=16)
    shapes = jax.eval_shape(vit.ViT(**model).init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    params = jax.tree.map(lambda s: rng.random(s.shape, np.float32), shapes["params"])
    tensors.write(path, names.encoder_to_torch(params, 16, (4, 4)))
    size = path.stat().st_size / 1024
    assert size > 200_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "import", str(path), str(tmp_path / "run"), "--heads=10",
         "--ln_eps=1e-6"], capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    assert peak - before < 2 * size
    assert_trees_equal(exporting.load(tmp_path / "run").encoder, params)


def test_a_stage_starts_from_a_file_at_another_image_size(tmp_path, monkeypatch):
    """`init_from=FILE` in a training page; the encoder is the file's, its positions resized."""
    module = vit.ViT(width=32, depth=4, heads=2, patch_size=7)
    params = jax.jit(module.init)(jax.random.key(1), np.zeros((1, 14, 14, 1)))["params"]
    about = {"num_attention_heads": "2", "layer_norm_eps": "1e-6"}
    path = tmp_path / "small.safetensors"
    tensors.write(path, names.encoder_to_torch(jax.device_get(params), 7, (2, 2)), about=about)
    page, workdir = str(CONFIGS / "head_vith14.py:test"), tmp_path / "head"
    run_on(monkeypatch, (1, 2), pages.load(page, [f"init_from={path}", SMALL]), workdir)
    found = exporting.load(workdir)
    assert found.stage == "head"
    want = positions.resize(positions.sincos((2, 2), 32), (2, 2), (4, 4))
    np.testing.assert_array_equal(found.encoder.pop("pos_embed"), want)
    assert_trees_equal(found.encoder, jax.device_get(params))
    # What the page says of its model must be the file's.
    for override, message in (("model.heads=4", "heads 2"), ("model.patch_size=14", "patch_size")):
        config = pages.load(page, [f"init_from={path}", override])
        with pytest.raises(UserError, match=message):
            run_on(monkeypatch, (1, 2), config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
