"""The machine that executes PTX, on programs of a few lines."""

import numpy as np
import pytest
import torch

from tests.ptx.machine import Fault, Kernel, Memory

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def run(body: str, *tensors: torch.Tensor, threads: int = 32, shared: int = 0, written=(0,)):
    """A program whose parameters are tensors, of which those at some places may be written."""
    given = ",\n".join(f".param .u64 p_param_{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [p_param_{i}];" for i in range(len(tensors)))
    start = "mov.u32 %r0, %tid.x;\n" + "\n".join(
        f"mad.wide.s32 %rd{10 + i}, %r0, {tensor.element_size()}, %rd{i};"
        for i, tensor in enumerate(tensors)
    )
    head = f".visible .entry p(\n{given}\n)\n.reqntid {threads}\n"
    ptx = f"{head}{{\n{loads}\n{start}\n{body}\nret;\n}}"
    memory = Memory()
    for i, tensor in enumerate(tensors):
        memory.give(tensor.data_ptr(), tensor.nbytes, write=i in written)
    Kernel(ptx).run(0, [tensor.data_ptr() for tensor in tensors], memory, shared)
    return tensors[0]


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", BF16), ("f16", F16)])
def test_rounding_to_16_bits(kind: str, dtype: torch.dtype) -> None:
    """To nearest, ties to even: torch's."""
    exact = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3e38, 1e-40, -0.0, torch.inf])
    x = torch.cat([exact, torch.randn(24, generator=torch.Generator().manual_seed(0)) * 1e-3])
    body = f"""ld.global.b32 %r1, [%rd11];
    cvt.rn.{kind}.f32 %rs1, %r1;
    st.global.b16 [%rd10], %rs1;"""
    assert torch.equal(run(body, torch.zeros(32, dtype=dtype), x), x.to(dtype))
    body = f"""ld.global.b32 %r1, [%rd11];
    cvt.rn.{kind}x2.f32 %r2, 0f3F800000, %r1;
    mov.b32 {{%rs1, %rs2}}, %r2;
    st.global.b16 [%rd10], %rs1;"""
    assert torch.equal(run(body, torch.zeros(32, dtype=dtype), x), x.to(dtype))


def test_denormal_numbers_are_kept() -> None:
    x = torch.full((32,), 2.0**-140)
    body = """ld.global.b32 %r1, [%rd11];
    mul.rn.f32 %r2, %r1, 0f3F000000;
    st.global.b32 [%rd10], %r2;"""
    assert torch.equal(run(body, torch.zeros(32), x), torch.full((32,), 2.0**-141))


def test_comparisons_with_nan() -> None:
    x = torch.full((32,), torch.nan)
    for how, wanted in {"lt": 0, "neu": 1, "ne": 0, "equ": 1, "eq": 0, "num": 0, "nan": 1}.items():
        body = f"""ld.global.b32 %r1, [%rd11];
        setp.{how}.f32 %p1, %r1, 0f00000000;
        selp.b32 %r2, 1, 0, %p1;
        st.global.b32 [%rd10], %r2;"""
        found = run(body, torch.zeros(32, dtype=torch.int32), x)
        assert (found == wanted).all(), how


def test_conversions_to_whole_numbers_saturate() -> None:
    x = torch.tensor([1.9, -1.9, 1e20, -1e20, torch.nan, 0.0] + [7.5] * 26)
    body = "ld.global.b32 %r1, [%rd11];\ncvt.rzi.s32.f32 %r2, %r1;\nst.global.b32 [%rd10], %r2;"
    found = run(body, torch.zeros(32, dtype=torch.int32), x).tolist()
    assert found[:7] == [1, -1, 2**31 - 1, -(2**31), 0, 0, 7]


def test_an_asynchronous_copy_arrives_when_it_is_waited_for() -> None:
    body = """shl.b32 %r3, %r0, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd11 + 0 ], 0x4, 0x4;
    cp.async.commit_group;
    {}
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd10], %r6;"""
    x = torch.arange(1.0, 33)
    early = run(body.format("cp.async.wait_group 1;"), torch.ones(32), x, shared=128)
    assert not early.any()
    late = run(body.format("cp.async.wait_group 0;"), torch.ones(32), x, shared=128)
    assert torch.equal(late, x)


def test_lanes_exchange() -> None:
    body = """ld.global.b32 %r1, [%rd11];
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    redux.sync.add.s32 %r3, %r1, %r1;
    sub.s32 %r4, %r3, %r2;
    st.global.b32 [%rd10], %r4;"""
    x = torch.arange(32, dtype=torch.int32)
    found = run(body, torch.zeros(32, dtype=torch.int32), x)
    assert found.tolist() == [496 - (i ^ 1) for i in range(32)]


FAULTS = {
    "ld.global.b32 %r1, [%rd11+128];": "read of 4 bytes outside of what was given, by 32 lanes",
    "ld.global.b32 %r1, [%rd11+4];": "read of 4 bytes outside of what was given, by 1 lanes",
    "ld.global.b32 %r1, [%rd11+2];": "not a multiple",
    "st.global.b32 [%rd11], %r0;": "write of 4 bytes outside of what was given, by 32 lanes",
    "mov.b32 %r4, global_smem;\nld.shared.b32 %r1, [%r4];": "of which there are 0",
    "fma.rn.f32 %r1, %r0, %r0, %r0;": "not known: fma.rn.f32",
    "ex2.approx.f32 %r1, %r0;": "not known: ex2",
    "add.f32 %r1, %r0, %r0;": "not known: add.f32",
    "add.rn.ftz.f32 %r1, %r0, %r0;": "not known: add.rn.ftz",
    "mul.rz.f32 %r1, %r0, %r0;": "not known: mul.rz",
    "setp.lt.s32 %p1, %r0, 7;\n@%p1 bra $L;\n$L:": "lanes part",
}


@pytest.mark.parametrize("body", FAULTS)
def test_what_is_refused(body: str) -> None:
    with pytest.raises(Fault, match=FAULTS[body]):
        run(body, torch.zeros(32), torch.zeros(32))


def test_loops_and_guards() -> None:
    """A loop of ten rounds, and a store of some lanes."""
    body = """mov.b32 %r1, 0;
    $Lloop:
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p1, %r1, 10;
    @%p1 bra $Lloop;
    setp.lt.s32 %p2, %r0, 3;
    @!%p2 st.global.b32 [%rd10], %r1;"""
    found = run(body, torch.zeros(32, dtype=torch.int32))
    assert found.tolist() == [0] * 3 + [10] * 29
    assert np.array(found).sum() == 290
