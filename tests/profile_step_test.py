"""The profile of a step: kinds of operations, time that counts once, a program that one knows.

Marked slow: a step of ct.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile_step
from benchmarks.accelerator import Case, Program
from benchmarks.profile_step import Event, Operation, exclusive, operations

KINDS = {
    "matrix products", "attention", "normalisation and elementwise", "optimiser", "queue search",
    "views", "collectives", "copies and casts", "other",
}  # fmt: skip


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        # A loop holds its body; on another line something begins before the body ends.
        ([("loop", 0, 10), ("body", 1, 4), ("body", 5, 8)], {"loop": 4, "body": 6}),
        ([("loop", 0, 10), ("body", 1, 4), ("other", 3, 12)], {"loop": 1, "body": 2, "other": 9}),
        ([("a", 0, 2), ("b", 5, 6)], {"a": 2, "b": 1}),
        ([("a", 0, 4), ("a", 0, 4), ("b", 2, 3)], {"a": 3, "b": 1}),
        ([], {}),
    ],
)
def test_no_time_counts_twice(events, expected):
    seconds: dict[str, float] = {}
    for name, took in exclusive(Event(*event) for event in events):
        seconds[name] = seconds.get(name, 0) + took
    assert seconds == expected


def of(opcodes, scope="", target=""):
    return Operation("x", frozenset(opcodes.split()), target, scope, "").kind


def test_kinds():
    block = "jit(step)/transpose(jvp(ViT))/while/body/blocks"
    assert of("fusion dot add", f"{block}/attn/qkv/dot_general") == "matrix products"
    assert of("custom-call", f"{block}/fc1/dot_general", "__cublas$gemm") == "matrix products"
    assert of("fusion dot", f"{block}/attn/vmap(BNTS,BSNH->BTNH)/dot_general") == "attention"
    assert of("custom-call", "", "__cudnn$fmhaSoftmaxBackward") == "attention"
    assert of("fusion reduce multiply", f"{block}/norm1/mul") == "normalisation and elementwise"
    assert of("fusion multiply dot", "jit(step)/optimizer/mul") == "optimiser"
    assert of("custom-call", "jit(step)/jvp(queue)/while/body/top_k", "TopK") == "queue search"
    assert of("fusion divide", "jit(step)/views/div") == "views"
    assert of("all-reduce-start", "jit(step)/optimizer/mul") == "collectives"
    assert of("fusion convert transpose", f"{block}/attn/unstack") == "copies and casts"
    assert of("sort", "jit(step)/sort") == "other"


PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/here/maect_jax/models/vit.py"
2 "/there/site-packages/jax/nn.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=14 column=4 end_column=17}
2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=4 end_column=17}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused_computation (param_0: bf16[8,4], param_1: bf16[4,8]) -> (bf16[8,8], bf16[8,8]) {
  %param_0 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[4,8]{1,0} parameter(1)
  %dot.2 = bf16[8,8]{1,0} dot(%param_0, %param_1), metadata={op_name="fc1/dot" stack_frame_id=2}
  ROOT %tuple.1 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%dot.2, %dot.2)
}

ENTRY %main (x: bf16[8,4], y: bf16[4,8]) -> bf16[8,8] {
  %x = bf16[8,4]{1,0} parameter(0)
  %y = bf16[4,8]{1,0} parameter(1)
  %gemm.1 = (bf16[8,8]{1,0}, /*index=1*/bf16[8,8]{1,0}) fusion(%x, %y), calls=%fused_computation
  %get-tuple-element = bf16[8,8]{1,0} get-tuple-element(%gemm.1), index=0
  ROOT %copy.3 = bf16[8,8]{0,1} copy(%get-tuple-element), metadata={op_name="c" stack_frame_id=1}
}
"""


def test_a_program_is_read():
    """A fusion of which only what is fused says what it is; a tuple; layouts with brackets."""
    found = operations(PROGRAM)
    fusion, copy = found["gemm.1"], found["copy.3"]
    assert (fusion.kind, copy.kind) == ("matrix products", "copies and casts")
    assert {"fusion", "dot"} <= fusion.opcodes
    # The line of this project that called the library.
    assert (fusion.scope, fusion.source) == ("fc1/dot", "models/vit.py:12")
    assert copy.source == "models/vit.py:12"


def event(name, start, took, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=took, stats=stats.items())


def plane(name, **lines):
    lines = [SimpleNamespace(name=line, events=events) for line, events in lines.items()]
    return SimpleNamespace(name=name, lines=lines)


def test_events_of_each_device():
    """Of the first one, and of the program; a kernel of a GPU may not say whose it is."""
    own, other = dict(hlo_op="gemm.1", hlo_module="jit_step(12)"), dict(hlo_module="jit_other")
    kernels = [event("nvjet", 0, 9, **own), event("Memcpy", 9, 5), event("x", 20, 5, **other)]
    gpus = [plane(f"/device:GPU:{i}", Stream=kernels, Steps=[event("1", 0, 99)]) for i in (0, 1)]
    work = [event("dot.1", 0, 9, hlo_op="dot.1", hlo_module="jit_step")]
    host = plane("/host:CPU", python=[event("foo", 0, 9)], tf_XLAPjRt=work)
    tpu = plane("/device:TPU:0", **{"XLA Ops": [event("%fusion.3 = bf16[8] fusion(%x)", 0, 7)]})

    def found(*planes):
        return profile_step.events_of(SimpleNamespace(planes=planes), "jit_step")

    assert found(host, *gpus) == [("gemm.1", 0, 9), ("Memcpy", 9, 14)]
    assert found(host) == [("dot.1", 0, 9)]
    assert found(host, tpu) == [("fusion.3", 0, 7)]


def test_kernels_that_name_no_operation_are_told_by_their_name():
    kinds = {
        name: profile_step.kind_of({}, name)
        for name in ("nvjet_tst_128x256", "cudnn_sm90_flash_fprop", "MemcpyD2D", "mystery")
    }
    assert [*kinds.values()] == ["matrix products", "attention", "copies and casts", "other"]
    events = [Event("mystery", 0, 3e9), Event("nvjet", 4e9, 6e9)]
    got = profile_step.summary({}, events, steps=2, wall=4)
    assert (got["kinds"], got["unknown"]) == ({"other": 1.5, "matrix products": 1.0}, 2.5)
    assert got["idle"] == 1.5


def assert_sums_up(result):
    """No more time than a step takes, in known kinds; nothing that the program does not have."""
    assert result["kinds"].keys() <= KINDS
    assert 0 < sum(result["kinds"].values()) <= result["seconds"]
    assert result["idle"] == pytest.approx(result["seconds"] - sum(result["kinds"].values()))
    assert result["unknown"] == 0


def test_products_are_found_in_a_step_that_is_all_products():
    x = jnp.ones((512, 512))

    def all_products(state, batch):
        for _ in range(4):
            state = state @ batch
        with jax.named_scope("queue"):
            return state, jnp.sort(state[0])

    compiled = jax.jit(all_products).lower(x, x / 512).compile()
    program = Program(None, compiled, x, x / 512, None, 0.0)
    result = profile_step.profile(program, steps=3)
    assert_sums_up(result)
    largest = result["operations"][0]
    assert next(iter(result["kinds"])) == largest["kind"] == "matrix products"
    assert largest["runs"] in (1, 4)
    assert "queue search" in result["kinds"]


@pytest.mark.slow
def test_of_a_step_of_ct_every_kind_is_found():
    # Without a change of colours the views are a part of what reads them.
    colours = ("ct.photometric.grayscale=(0.5, 0.5)",)
    case = Case("ct_vitb16:test", "xla", batch_size=16, steps=2, settings=colours)
    result = profile_step.profile(profile_step.program_of(case), case.steps)
    assert_sums_up(result)
    assert result["kinds"].keys() >= KINDS - {"collectives", "other"}
    text = profile_step.table(result)
    assert f"| {1000 * result['seconds']:,.2f} | 100.0% |" in text
    json.dumps(result)
