"""PyTorch's tensors and this package's variables, there and back."""

from pathlib import Path

import numpy as np
import pytest

from maect_jax.convert import names as convert
from maect_jax.convert.tensors import Stored
from maect_jax.errors import UserError
from maect_jax.models import vit
from maect_jax.stages import support_queue
from tests.helpers import golden_figures as figures
from tests.helpers.contrast_run import behind

MAE, CT = figures.cases("mae"), figures.cases("ct")
by_mae_case = pytest.mark.parametrize("case", MAE, ids=str)
by_ct_case = pytest.mark.parametrize("case", CT, ids=str)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        np.testing.assert_array_equal(got[name], x, err_msg=name)


@by_mae_case
def test_encoder_and_decoder_there_and_back_are_bit_equal(case):
    encoder, decoder = case.under("encoder/"), case.under("decoder/")
    params = convert.encoder_from_torch(encoder, case.grid)
    assert_same(convert.encoder_to_torch(params, case.meta["patch_size"], case.grid), encoder)
    decoder_params = convert.decoder_from_torch(decoder, case.grid)
    assert_same(convert.decoder_to_torch(decoder_params, case.grid), decoder)


@by_ct_case
def test_head_there_and_back_is_bit_equal(case):
    tensors = case.under("init/head/")
    head = convert.head_from_torch(tensors)
    tensors = {name: x for name, x in tensors.items() if not name.endswith("batches_tracked")}
    assert_same(convert.head_to_torch(head), tensors)
    queue = support_queue.rebatch(head["queue"], case.meta["queue_size"], 7)
    again = convert.head_to_torch({"queue": queue}, case.meta["queue_size"])
    assert again["queue"].shape == tensors["queue"].shape


@by_ct_case
@pytest.mark.parametrize("batch", [5, 7, 64])
def test_the_queue_is_the_same_fifo_for_any_batch(case, batch):
    tensors, size = case.under("init/head/"), case.meta["queue_size"]
    queue = support_queue.rebatch(convert.head_from_torch(tensors)["queue"], size, batch)
    names = ("queue", "queue_id", "queue_y")
    oldest = int(tensors["queue_ptr"].item())
    for got, name in zip(support_queue.in_age_order(queue, size), names, strict=True):
        np.testing.assert_array_equal(got, np.roll(tensors[name], -oldest, axis=0))


@by_ct_case
def test_the_upper_blocks_alone_keep_their_numbers(case):
    tensors, frozen = case.under("init/encoder/"), case.meta["frozen_blocks"]
    trained, _ = vit.split_blocks(convert.encoder_from_torch(tensors, case.grid), frozen)
    got = behind(frozen, convert.encoder_to_torch(trained, case.meta["patch_size"]))
    assert_same(got, {name: tensors[name] for name in case.meta["encoder_groups"]})


@by_mae_case
def test_a_learned_position_embedding_is_kept_and_the_fixed_one_is_not(case, rng):
    tensors = case.under("encoder/")
    assert "pos_embed" not in convert.encoder_from_torch(tensors, case.grid)
    learned = rng.normal(size=tensors["pos_embed"].shape).astype(np.float32)
    tensors["pos_embed"] = learned
    params = convert.encoder_from_torch(tensors, case.grid)
    np.testing.assert_array_equal(params["pos_embed"], learned[0])
    assert_same(convert.encoder_to_torch(params, case.meta["patch_size"], case.grid), tensors)
    decoder = case.under("decoder/")
    assert "pos_embed" not in convert.decoder_from_torch(decoder, case.grid)
    decoder["pos_embed"] = decoder["pos_embed"] + np.float32(0.01)
    params = convert.decoder_from_torch(decoder, case.grid)
    assert_same(convert.decoder_to_torch(params, case.grid), decoder)


@by_mae_case
def test_what_is_missing_or_left_over_is_named(case):
    tensors = case.under("encoder/")
    del tensors["blocks.0.mlp.fc1.bias"]
    with pytest.raises(
        UserError, match=r"encoder: 'blocks\.\d\.mlp\.fc1\.bias' is missing in block 0"
    ):
        convert.encoder_from_torch(tensors, case.grid)
    tensors = {**case.under("encoder/"), "head.weight": np.zeros(1)}
    with pytest.raises(UserError, match=r"encoder: .*'head\.weight' is unexpected"):
        convert.encoder_from_torch(tensors, case.grid)
    with pytest.raises(UserError, match=r"encoder: pos_embed has \d+ rows, not 81"):
        convert.encoder_from_torch(case.under("encoder/"), (9, 9))


@by_ct_case
def test_a_queue_in_part_is_refused(case):
    head = case.under("init/head/")
    del head["queue_y"]
    with pytest.raises(UserError, match=r"head: tensors \['queue_y'\] are missing"):
        convert.head_from_torch(head)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("decoder.decoder_layers.0.attention.output.dense.weight", "decoder"),  # transformers 4
        ("decoder.decoder_encoder.layer.0.attention.output.dense.weight", "decoder"),  # 5
        ("decoder.decoder_layers.0.attention.o_proj.weight", "decoder"),  # state_dict() of 5
        ("vit.encoder.layer.0.attention.output.dense.weight", "encoder"),
        ("encoder.layer.0.attention.output.dense.weight", "encoder"),
        ("vit.layers.0.attention.o_proj.weight", "encoder"),
    ],
)
def test_huggingfaces_spellings_are_one_tensor(name, part):
    mark = "vit.embeddings.patch_embeddings.projection.weight"
    file = {n: Stored((n,), (4, 4), np.zeros, Path("x")) for n in (mark, name)}
    assert convert.sort(file, "x").parts[part]["blocks.0.attn.proj.weight"] is file[name]
