"""Files from elsewhere that are wrong, or that do not tell all: one clear line, nothing in part."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from maect_jax.convert import importing, tensors
from maect_jax.errors import UserError
from tests.helpers.foreign_files import CT, flags, run_convert, stated


def broken(change):
    found = CT.under("init/encoder/")
    change(found)
    return found


def reshaped(found):
    found["blocks.1.mlp.fc2.bias"] = np.zeros(5, np.float32)


def with_position(shape, dtype=np.float32):
    return broken(lambda t: t.update({"pos_embed": np.zeros(shape, dtype)}))


def with_scales(width, blocks):
    scales = [f"blocks.{i}.ls{branch}.gamma" for i in blocks for branch in (1, 2)]
    return broken(lambda t: t.update(dict.fromkeys(scales, np.ones(width, np.float32))))


ROWS, WIDTH = CT.grid[0] * CT.grid[1], CT.meta["width"]
# What is wrong with a file, by what the error says.
WRONG = {
    "the classifier's tensor 'head.0.running_var' is missing": broken(
        lambda t: t.update({"head.1.weight": np.zeros((3, WIDTH), np.float32),
                            "head.1.bias": np.zeros(3, np.float32),
                            "head.0.running_mean": np.zeros(WIDTH, np.float32)})
    ),
    "the encoder's tensor 'blocks.1.attn.qkv.bias' is missing": broken(
        lambda t: t.pop("blocks.1.attn.qkv.bias")
    ),
    "the encoder's tensor 'pos_embed' is missing": broken(lambda t: t.pop("pos_embed")),
    "'blocks.1.mlp.fc2.bias' has shape (5,), must be": broken(reshaped),
    f"'pos_embed' has shape (1, {ROWS}, 1), must be (1, {ROWS}, {WIDTH})": with_position(
        (1, ROWS, 1)
    ),
    f"'pos_embed' has shape (2, {ROWS}, {WIDTH}), must be": with_position((2, ROWS, WIDTH)),
    f"'pos_embed' has shape (1, {ROWS + 3}, {WIDTH}), not that of a square": (
        with_position((1, ROWS + 3, WIDTH))
    ),
    "'norm.bias' must hold floats of 16, 32 or 64 bits": broken(
        lambda t: t.update({"norm.bias": np.zeros(WIDTH, np.int8)})
    ),
    "'blocks.0.ls1.gamma' has shape (3,), must be": with_scales(3, range(CT.meta["depth"])),
    "the encoder's tensor 'blocks.1.ls1.gamma' is missing": with_scales(WIDTH, [0]),
    "the Vision Transformer here has no tensor like 'blocks.0.attn.lora'; such": broken(
        lambda t: t.update({"blocks.0.attn.lora": np.zeros(3, np.float32)})
    ),
    "none of the kinds that can be read": {"conv1.weight": np.zeros((3, 3), np.float32)},
    "holds a contrastive head of MAE-CT's authors, and no encoder; name the file of its encoder": (
        CT.under("init/head/")
    ),
    "the encoder's tensor 'patch_embed.proj.weight' is missing": broken(
        lambda t: [t.pop("patch_embed.proj.weight"), t.update(
            {"decoder_embed.weight": np.zeros((4, 4), np.float32)})]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("message", "found"), WRONG.items(), ids=list(WRONG))
def test_what_is_no_whole_model_is_one_clear_line(file, message, found):
    with pytest.raises(UserError) as error:
        importing.recognised([file(found)], stated(CT))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_file_does_not_tell_is_asked_for(file, tmp_path):
    path = file(CT.under("init/encoder/"))
    with pytest.raises(UserError, match=r"none of \[192, .* with --heads and --ln_eps"):
        importing.recognised([path])
    with pytest.raises(UserError, match=r"safetensors: image_size=\(17, 17\): .* patch size"):
        importing.recognised([path], stated(CT, image_size=(17, 17)))
    with pytest.raises(UserError, match="another encoder; one file of each"):
        importing.recognised([path, path], stated(CT))
    with pytest.raises(UserError, match="there is no such file"):
        importing.recognised([tmp_path / "absent.safetensors"])
    (tmp_path / "notes.txt").write_text("weights")
    with pytest.raises(UserError, match="no file of PyTorch or safetensors: it starts with b'w"):
        importing.recognised([tmp_path / "notes.txt"])


def test_numbers_that_are_none_are_refused(file):
    with pytest.raises(UserError, match=r"'norm\.weight' holds numbers that are not finite"):
        importing.recognised(
            [file(broken(lambda t: t.update({"norm.weight": t["norm.weight"] * np.nan})))],
            stated(CT),
        ).read()


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"num_attention_heads": "many"}, "num_attention_heads is 'many', must be a number above"),
        ({"layer_norm_eps": "nan"}, "layer_norm_eps is 'nan', must be a number above 0"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', must be 'gelu'"),
        ({"image_size": "[1, 2, 3]"}, "image_size is '[1, 2, 3]', must be one side or two"),
        ({"hidden_size": "7"}, f"hidden_size is '7', must be {WIDTH}"),
    ],
)
def test_what_is_told_beside_the_tensors_is_checked(tmp_path, beside, message):
    path = tmp_path / "told.safetensors"
    stated = {"num_attention_heads": str(CT.meta["heads"]), "layer_norm_eps": "1e-6"} | beside
    tensors.write(path, CT.under("init/encoder/"), metadata=stated)
    with pytest.raises(UserError) as error:
        importing.recognised([path])
    assert message in str(error.value)


def test_nothing_is_written_of_what_cannot_be_read(file, tmp_path, monkeypatch):
    path = file(CT.under("init/encoder/"))
    path.write_bytes(path.read_bytes()[:-100])  # a download that was cut short
    run = tmp_path / "run"
    with pytest.raises(UserError, match="not a whole safetensors file"):
        run_convert(monkeypatch, "import", path, run, *flags(CT))
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
        importing.recognised([path], stated(CT)).read()
