"""Reading what a program sends: by hand on HLO as a TPU's compiler writes it, and on a real one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maect_jax.compile import collectives
from maect_jax.compile.collectives import Collective
from tests.helpers.common import mesh_of

# One all-gather that overlaps with a product (three phases, one channel) and a reduce-scatter, in
# a loop of six; an all-reduce within pairs and an exchange among all after it.
TPU = """
HloModule jit_step

%all-reduce-scatter.1 (input.2: f32[512,512]) -> f32[128,512] {
  %input.2 = f32[512,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[512,512]{1,0:T(8,128)} all-reduce(%input.2), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.clone
  ROOT %dynamic-slice.37 = f32[128,512]{1,0} dynamic-slice(%all-reduce.5), sizes={128,512}
}

%start (param_0.59: bf16[1,128,512]) -> (bf16[1,128,512], bf16[1,512,512]) {
  %param_0.59 = bf16[1,128,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.19 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.59), channel_id=8, \
replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([4,2]T(1,0)) {'axis_0'}
  ROOT %custom-call.4 = (bf16[1,128,512]{2,1,0}) custom-call(%all-gather.19)
}

%done (param_0.67: bf16[1,128,512]) -> bf16[1,512,512] {
  %param_0.67 = bf16[1,128,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.23 = bf16[1,512,512]{2,1,0} all-gather(%param_0.67), channel_id=8, \
replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([4,2]T(1,0)) {'axis_0'}
}

%body (p: (s32[], bf16[1,128,512])) -> (s32[], bf16[1,128,512]) {
  %p = (s32[]{:T(128)}, bf16[1,128,512]{2,1,0}) parameter(0)
  %part = bf16[1,128,512]{2,1,0} get-tuple-element(%p), index=1
  %begin = (bf16[1,128,512]{2,1,0}) fusion(%part), kind=kCustom, calls=%start
  %whole = bf16[1,512,512]{2,1,0} fusion(%part), kind=kCustom, calls=%done
  %grad = f32[128,512]{1,0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[1,128,512]{2,1,0}) tuple(%part)
}

%condition (q: (s32[], bf16[1,128,512])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[1,128,512]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} fusion(%i), kind=kLoop, calls=%less
}

%less (i.1: s32[]) -> pred[] {
  %i.1 = s32[]{:T(128)} parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[8,4], y: f32[16]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %loop = (s32[], bf16[1,128,512]{2,1,0}) while(%x), condition=%condition, body=%body
  %sum = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %out = f32[16]{0} all-to-all(%y), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}
}
"""


def test_a_tpu_program_is_read_as_by_hand():
    found = {c.name: c for c in collectives.read(TPU, 8)}
    assert found == {
        "all-reduce.5": Collective("all-reduce.5", "reduce-scatter", 4 * 512 * 512, 4, 6),
        "all-gather.19": Collective("all-gather.19", "all-gather", 2 * 128 * 512, 4, 6),
        "sum": Collective("sum", "all-reduce", 4 * 8 * 4, 2, 1),
        "out": Collective("out", "all-to-all", 4 * 16, 8, 1),
    }
    sent = {name: c.sent for name, c in found.items()}
    assert sent == {
        "all-reduce.5": 4 * 512 * 512 * 3 / 4,
        "all-gather.19": 2 * 128 * 512 * 3,
        "sum": 4 * 8 * 4,
        "out": 4 * 16 * 7 / 8,
    }
    totals = collectives.by_kind(list(found.values()))
    assert totals["all-gather"] == {
        "times": 6, "operand_bytes": 6 * 2 * 128 * 512, "sent_bytes": 18 * 2 * 128 * 512,
    }  # fmt: skip
    assert list(totals) == ["all-gather", "all-reduce", "reduce-scatter", "all-to-all"]


@pytest.mark.parametrize(
    ("old", "new"), [("constant(6)", "parameter(1)"), ("to-all(%y)", "to-all()")]
)
def test_an_unknown_size_or_count_is_an_error(old, new):
    assert old in TPU
    with pytest.raises(ValueError, match="cannot tell"):
        collectives.read(TPU.replace(old, new), 8)


def test_a_compiled_loop_counts_as_often_as_it_runs():
    """Weights sharded over two devices are gathered for each of five layers, on four pairs."""
    mesh = mesh_of(4, 2)
    weights = jax.ShapeDtypeStruct(
        (5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None))
    )
    x = jax.ShapeDtypeStruct(
        (32, 16), jnp.float32, sharding=NamedSharding(mesh, P(mesh.axis_names))
    )

    def run(weights, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P(mesh.axis_names)), None

        return jax.lax.scan(layer, x, weights)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(weights, x).compile().as_text()
    totals = collectives.by_kind(collectives.read(text, 8))
    assert totals == {
        "all-gather": {"times": 5, "operand_bytes": 5 * 8 * 16 * 4, "sent_bytes": 5 * 8 * 16 * 4}
    }
