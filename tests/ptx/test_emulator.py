"""The emulator itself, on PTX written by hand: what is right gives the right numbers, and each kind of fault is seen."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import emulator as ptx

pytestmark = pytest.mark.skipif(ptx.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def emulator():
    return ptx.Emulator()


def kernel(body, shared="", directives=""):
    """A kernel of a pointer and a number: %tid.x is in %r1, %ctaid.x in %r2, 4 %tid.x in %r3, the pointer in %rd1, and
    the pointer plus 4 %tid.x in %rd2."""
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry test(.param .u64 .ptr .global .align 1 test_0, .param .u32 test_1) {directives}
{{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %rd<20>; .reg .f64 %fd<9>;
  {shared}
  ld.param.u64 %rd1, [test_0];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  shl.b32 %r3, %r1, 2;
  mad.wide.u32 %rd2, %r1, 4, %rd1;
  {body}
  ret;
}}
"""


def run(emulator, text, memory, block=64, grid=1, shared=0, number=0, seed=0):
    """Launches it on a tensor, of which it may touch all."""
    parameters = [memory.data_ptr().to_bytes(8, "little"), number.to_bytes(4, "little")]
    module = emulator.load(text)
    place = (grid, 1, 1), (block, 1, 1), shared
    emulator.launch(module, "test", *place, parameters, [ptx.extent(memory, "x")], seed=seed)


def words(count):
    return torch.zeros(count, dtype=torch.int32)


def finds(emulator, message, text, memory=None, **place):
    with pytest.raises(ptx.Problem, match=message):
        run(emulator, text, words(64) if memory is None else memory, **place)


STORE = "st.global.u32 [%rd2], %r10;"
OWN_SHARED = "mov.u32 %r4, smem; add.s32 %r4, %r4, %r3;"


# ---- numbers ------------------------------------------------------------------------------------------------------

ONE, THREE = "0f3F800000", "0f40400000"
VALUES = {
    "add.s32 %r10, %r1, -3;": lambda t: t - 3,
    "mul.lo.s32 %r10, %r1, -7; rem.s32 %r10, %r10, 5;": lambda t: -((7 * t) % 5),
    "div.s32 %r10, %r1, 0;": lambda t: torch.full_like(t, -1),
    "mul.hi.u32 %r10, %r1, 0x80000001;": lambda t: t // 2,
    "shr.s32 %r10, -64, %r1;": lambda t: torch.bitwise_right_shift(torch.full_like(t, -64), t.clamp(max=31)),
    "shl.b32 %r10, 1, %r1;": lambda t: torch.where(t < 32, torch.bitwise_left_shift(torch.ones_like(t), t), 0),
    "bfe.u32 %r10, %r1, 1, 3;": lambda t: t // 2 % 8,
    "bfe.s32 %r10, %r1, 1, 2;": lambda t: (t // 2 % 4 + 2) % 4 - 2,
    "bfi.b32 %r10, %r1, 255, 2, 4;": lambda t: 0b11000011 + t % 16 * 4,
    "prmt.b32 %r10, %r1, 0x44332211, 0x7540;": lambda t: 0x44220000 + 0x1100 + t,
    "lop3.b32 %r10, %r1, 12, 5, 0x96;": lambda t: t ^ 12 ^ 5,
    "setp.gt.u32 %p1, %r1, 5; selp.b32 %r10, 1, 2, %p1;": lambda t: torch.where(t > 5, 1, 2),
    "setp.gt.u32 %p2, %r1, 9; setp.lt.or.u32 %p1, %r1, 5, %p2; selp.b32 %r10, 1, 2, %p1;": lambda t: torch.where(
        (t < 5) | (t > 9), 1, 2
    ),
    "clz.b32 %r10, %r1; popc.b32 %r11, %r1; add.s32 %r10, %r10, %r11;": lambda t: torch.tensor(
        [32 - int(v).bit_length() + int(v).bit_count() for v in t]
    ),
    "cvt.rn.f32.u32 %f1, %r1; sqrt.approx.ftz.f32 %f1, %f1; cvt.rmi.f32.f32 %f1, %f1; cvt.rzi.s32.f32 %r10, %f1;": (
        lambda t: t.sqrt().floor().int()
    ),
    f"cvt.rn.f32.u32 %f1, %r1; div.full.f32 %f1, %f1, {THREE}; mov.b32 %r10, %f1;": lambda t: (t / 3).view(torch.int32),
    "cvt.rn.f32.u32 %f1, %r1; ex2.approx.f32 %f1, %f1; mov.b32 %r10, %f1;": lambda t: t.float().exp2().view(torch.int32),
    "cvt.rn.f32.u32 %f1, %r1; mul.f32 %f1, %f1, 0f3F800001; cvt.rn.bf16x2.f32 %r10, %f1, %f1;": lambda t: (
        (t * 1.0000001).bfloat16().view(torch.int16).int() * 65537
    ),
    "mul.lo.s32 %r11, %r1, 0x00010401; add.s16x2 %r10, %r11, 0x0005fff8;": lambda t: (
        ((t * 0x401 - 8) & 0xFFFF) + (t + 5) * 65536
    ),
    "cvt.rn.f64.s32 %fd1, %r1; fma.rn.f64 %fd1, %fd1, %fd1, 0dBFF0000000000000; cvt.rni.s32.f64 %r10, %fd1;": lambda t: (
        t * t - 1
    ),
    f"mov.b32 %f1, 0f00000001; add.ftz.f32 %f1, %f1, {ONE}; mov.f32 %f2, 0f00000001; abs.ftz.f32 %f2, %f2;"
    "mov.b32 %r10, %f2;": lambda t: 0 * t,
    "mov.b64 %rd3, {%r1, 7}; mov.b64 {_, %r11}, %rd3; mov.b64 {%r12, %r13}, %rd3; mad.lo.s32 %r10, %r11, %r12, %r13;": (
        lambda t: 7 * t + 7
    ),
    "and.b32 %r11, %r1, 31; shfl.sync.bfly.b32 %r10, %r1, 5, 31, -1;": lambda t: t ^ 5,
    "shfl.sync.up.b32 %r10|%p1, %r1, 2, 0, -1; @!%p1 mov.u32 %r10, 99;": lambda t: torch.where(t % 32 < 2, 99, t - 2),
    "shfl.sync.idx.b32 %r10, %r1, 3, 31, -1;": lambda t: t // 32 * 32 + 3,
    "setp.lt.u32 %p1, %r1, 40; vote.sync.ballot.b32 %r10, %p1, -1;": lambda t: torch.where(t < 32, -1, 255),
    # Threads that go different ways, and meet again.
    "mov.u32 %r10, 0; and.b32 %r11, %r1, 3; LOOP: setp.eq.u32 %p1, %r11, 0; @%p1 bra END; add.s32 %r10, %r10, %r1;"
    "sub.s32 %r11, %r11, 1; bra.uni LOOP; END: shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;": lambda t: (t ^ 1) * ((t ^ 1) % 4),
    "ld.param.s32 %rd4, [test_1]; cvt.u32.u64 %r10, %rd4; { .reg .b32 tmp; mov.b32 tmp, 1; add.s32 %r10, %r10, tmp; }": (
        lambda t: 0 * t + 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", VALUES)
def test_values(emulator, body):
    memory, t = words(64), torch.arange(64, dtype=torch.int32)
    run(emulator, kernel(f"{body} {STORE}"), memory)
    assert torch.equal(memory.long() & 0xFFFFFFFF, VALUES[body](t).long() & 0xFFFFFFFF)


def test_shared_memory_barriers_and_blocks(emulator):
    """The block's values the other way round."""
    body = f"""{OWN_SHARED} mad.lo.s32 %r5, %r2, 1000, %r1; st.shared.u32 [%r4], %r5; bar.sync 0;
    sub.s32 %r6, 63, %r1; shl.b32 %r6, %r6, 2; mov.u32 %r7, smem; add.s32 %r7, %r7, %r6; ld.shared.u32 %r10, [%r7+0];
    mul.wide.u32 %rd5, %r2, 256; add.s64 %rd2, %rd2, %rd5; {STORE}"""
    memory = words(64 * 5)
    run(emulator, kernel(body), memory, grid=5, shared=256, seed=3)
    assert torch.equal(memory.view(5, 64), torch.arange(5)[:, None] * 1000 + torch.arange(64).flip(0))


def test_matrices_go_through_shared_memory_as_they_came(emulator):
    """stmatrix and ldmatrix, transposed once: rows and columns of 8 x 8 values change places."""
    at = "mov.u32 %r4, smem; and.b32 %r5, %r1, 31; mad.lo.s32 %r4, %r5, 16, %r4;"
    body = f"""{at} mul.lo.s32 %r6, %r1, 0x20002; add.s32 %r6, %r6, 0x10000;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {{%r6}}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {{%r10}}, [%r4]; {STORE}"""
    memory = words(32)
    run(emulator, kernel(body), memory, block=32, shared=512)
    assert torch.equal(memory.view(torch.int16).view(8, 8), torch.arange(64, dtype=torch.int16).view(8, 8).t())


def test_numbers_of_16_bits_are_rounded_as_torch_does(emulator):
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).mul(1e-6)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        memory = values.clone()
        body = f"ld.global.f32 %f1, [%rd2]; cvt.rn.{kind}.f32 %rs1, %f1; cvt.f32.{kind} %f2, %rs1; st.global.f32 [%rd2], %f2;"
        run(emulator, kernel(body), memory)
        assert torch.equal(memory, values.to(dtype).float())


# ---- faults -------------------------------------------------------------------------------------------------------


def test_accesses_out_of_bounds(emulator):
    finds(emulator, r"out of bounds: writes 4 bytes .*x\[63\] \+ 252, of 252 bytes", kernel(STORE), words(63))
    finds(emulator, "out of bounds: reads 4 bytes", kernel("ld.global.u32 %r10, [%rd1+-4];"))
    finds(
        emulator,
        "out of bounds: writes 4 bytes at 252 of 252 bytes of shared",
        kernel(f"{OWN_SHARED} st.shared.u32 [%r4], 0;"),
        shared=252,
    )
    finds(emulator, "out of bounds: .*local", kernel("st.local.u32 [stack+8], 0;", ".local .align 8 .b8 stack[8];"))
    run(emulator, kernel("setp.lt.u32 %p1, %r1, 63; @%p1 " + STORE), words(63))  # the mask is respected


def test_accesses_that_are_not_aligned(emulator):
    body = "mad.wide.u32 %rd3, %r1, 16, %rd1; st.global.v4.b32 [%rd3], {%r1, %r1, %r1, %r1};"
    run(emulator, kernel(body), words(256))
    finds(emulator, "misaligned: writes 16 bytes", kernel(body), words(257)[1:])
    finds(emulator, "misaligned: reads 4 bytes", kernel("ld.shared.u32 %r10, [smem+2];"), shared=256)


def test_shared_memory_that_nobody_wrote(emulator):
    reads = "ld.shared.u32 %r10, [%r4];"
    finds(emulator, "init: reads shared memory that nobody wrote, byte 0", kernel(f"{OWN_SHARED} {reads}"), shared=256)
    half = "setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.u32 [%r4], 0;"
    finds(emulator, "nobody wrote, byte 128", kernel(f"{OWN_SHARED} {half} bar.sync 0; {reads}"), shared=256)


NEIGHBOUR = "xor.b32 %r5, %r1, 32; shl.b32 %r5, %r5, 2; mov.u32 %r6, smem; add.s32 %r6, %r6, %r5;"  # of the other warp


def test_races_in_shared_memory(emulator):
    writes, reads = "st.shared.u32 [%r4], %r1;", "ld.shared.u32 %r10, [%r6];"
    race = kernel(f"{OWN_SHARED} {NEIGHBOUR} {writes} {reads}")
    finds(emulator, "race: shared memory .*(.|\n)*ld.shared.*(.|\n)*the write by warp", race, shared=256)
    run(emulator, kernel(f"{OWN_SHARED} {NEIGHBOUR} {writes} bar.sync 0; {reads}"), words(64), shared=256)
    again = f"{OWN_SHARED} {NEIGHBOUR} {writes} bar.sync 0; {reads} add.s32 %r7, %r10, 1; st.shared.u32 [%r4], %r7;"
    finds(emulator, "race: (.|\n)*the read by warp", kernel(again), shared=256)
    finds(emulator, "two lanes write different values", kernel("st.shared.u32 [smem], %r1;"), shared=256, block=32)
    finds(emulator, "the write by warp", kernel("shr.u32 %r5, %r1, 5; st.shared.u32 [smem], %r5;"), shared=256)
    run(emulator, kernel("st.shared.u32 [smem], 7;"), words(64), shared=256)  # what all have, all may write


def test_a_barrier_of_some_threads_orders_these(emulator):
    """Warps 0 and 1 wait for each other, and warp 2 for nobody."""
    prologue = f"{OWN_SHARED} {NEIGHBOUR} st.shared.u32 [%r4], %r1; setp.ge.u32 %p1, %r1, 64; @%p1 bra OTHERS;"
    own = "bar.sync 1, 64; ld.shared.u32 %r10, [%r6]; ret; OTHERS: "
    run(emulator, kernel(prologue + own), words(96), block=96, shared=512)
    finds(emulator, "race", kernel(prologue + own + "ld.shared.u32 %r10, [smem];"), words(96), block=96, shared=512)


def test_what_is_copied_is_there_when_it_was_waited_for(emulator):
    begin = f"{OWN_SHARED} cp.async.ca.shared.global [%r4], [%rd2], 4; cp.async.commit_group; "
    end = f"ld.shared.u32 %r10, [%r4]; add.s32 %r10, %r10, 1; {STORE}"
    memory = torch.arange(64, dtype=torch.int32)
    run(emulator, kernel(f"{begin} cp.async.wait_group 0; {end}"), memory, shared=256)
    assert torch.equal(memory, torch.arange(1, 65, dtype=torch.int32))
    run(emulator, kernel(f"{begin} cp.async.wait_group 1; {end}"), memory, shared=256)  # not waited for: not there
    assert torch.equal(memory, torch.zeros_like(memory))


COUNT = "atom.global.{sem}.gpu.add.u32 %r10, [%rd1], 1;"
ONE_OF_A_BLOCK = "setp.ne.u32 %p1, %r1, 0; "


@pytest.mark.parametrize("seed", range(4))
def test_races_among_blocks(emulator, seed):
    memory = words(64)
    finds(
        emulator, "race: x.* (.|\n)*of block", kernel("st.global.u32 [%rd1], %r2;"), memory, grid=2, block=1, seed=seed
    )
    # The block that comes last reads what the others wrote: where it counts them with acquire and release.
    body = """mad.wide.u32 %rd3, %r2, 4, %rd1; st.global.u32 [%rd3+4], 1; atom.global.{}.gpu.add.u32 %r10, [%rd1], 1;
    setp.ne.u32 %p1, %r10, 7; @%p1 ret; mov.u32 %r11, 0; mov.u32 %r12, 8; mov.b64 %rd4, %rd1;
    NEXT: ld.global.u32 %r13, [%rd4+4]; add.s32 %r11, %r11, %r13; add.s64 %rd4, %rd4, 4; sub.s32 %r12, %r12, 1;
    setp.ne.u32 %p1, %r12, 0; @%p1 bra NEXT; st.global.u32 [%rd1+128], %r11;"""
    memory.zero_()
    run(emulator, kernel(body.format("acq_rel")), memory, grid=8, block=1, seed=seed)
    assert memory[32] == 8
    for weaker in ("relaxed", "release", "acquire"):
        finds(emulator, "race", kernel(body.format(weaker)), words(64), grid=8, block=1, seed=seed)
    fenced = body.replace("atom", "fence.acq_rel.gpu; atom").replace(
        "setp.ne.u32 %p1, %r10", "fence.acq_rel.gpu; setp.ne.u32 %p1, %r10"
    )
    run(emulator, kernel(fenced.format("relaxed")), words(64), grid=8, block=1, seed=seed)


def test_a_block_publishes_what_a_barrier_gave_it(emulator):
    """All threads write, the first one publishes: behind a barrier."""
    body = """mad.lo.s32 %r4, %r2, 64, %r1; mad.wide.u32 %rd3, %r4, 4, %rd1; st.global.u32 [%rd3+256], 1; {} mov.u32 %r10, 0;
    setp.ne.u32 %p1, %r1, 0; @%p1 bra ALL; atom.global.acq_rel.gpu.add.u32 %r10, [%rd1], 1; st.shared.u32 [smem], %r10;
    ALL: bar.sync 0; ld.shared.u32 %r10, [smem]; setp.ne.u32 %p1, %r10, 1; @%p1 ret;
    ld.global.u32 %r11, [%rd2+256]; ld.global.u32 %r12, [%rd2+512]; add.s32 %r11, %r11, %r12; st.global.u32 [%rd2+768], %r11;"""
    memory = words(256)
    run(emulator, kernel(body.format("bar.sync 0;")), memory, grid=2, shared=16)
    assert memory[192:].eq(2).all()
    finds(emulator, "race", kernel(body.format("")), words(256), grid=2, shared=16)


def test_blocks_that_wait_for_each_other(emulator):
    """Each of two blocks waits until the other one was there; all are there at once in a cooperative launch alone."""
    body = "atom.global.acq_rel.gpu.add.u32 %r10, [%rd1], 1; WAIT: ld.acquire.gpu.u32 %r11, [%rd1]; setp.ne.u32 %p1, %r11, 2; @%p1 bra WAIT;"
    module, memory = emulator.load(kernel(body)), words(1)
    parameters = [memory.data_ptr().to_bytes(8, "little"), bytes(4)]
    emulator.launch(module, "test", (2, 1, 1), (1, 1, 1), 0, parameters, [ptx.extent(memory, "x")], cooperative=True)
    assert memory.item() == 2


def test_threads_that_never_come(emulator):
    half = "setp.lt.u32 %p1, %r1, 16; @%p1 bra {}; bar.warp.sync 0xffff0000; "
    finds(
        emulator,
        "lanes wait for others of their warp",
        kernel("setp.lt.u32 %p1, %r1, 16; @%p1 bra A; shfl.sync.idx.b32 %r10, %r1, 0, 31, -1; A: bar.sync 0;"),
        block=32,
    )
    finds(
        emulator,
        "mask names lanes that have ended",
        kernel("setp.lt.u32 %p1, %r1, 16; @%p1 ret; shfl.sync.idx.b32 %r10, %r1, 20, 31, -1;"),
        block=32,
    )
    finds(emulator, "threads wait at barrier 1", kernel("setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1, 64; A:"))
    finds(emulator, "does not come to its end", kernel("FOREVER: bra.uni FOREVER;"), block=1)
    finds(emulator, "control: a trap", kernel("trap;"))
    run(emulator, kernel(half.format("A") + "A:"), words(64), block=32)


@pytest.mark.parametrize(
    "line", ["frob.b32 %r1, %r2;", "add.rz.f32 %f1, %f2, %f3;", "ld.global.v8.b32 {%r1}, [%rd1];", "mov.u32 %r1, %clock;", "bra NOWHERE;"]
)  # fmt: skip
def test_what_is_not_known_is_refused(emulator, line):
    with pytest.raises(ptx.Problem, match="unknown|no label"):
        emulator.load(kernel(line))


def test_launches_that_a_driver_refuses(emulator):
    finds(emulator, "another size", kernel("", directives=".reqntid 128"))
    finds(emulator, "a block of 64 threads", kernel("", directives=".maxntid 32"))
    finds(emulator, "more shared memory", kernel(""), shared=228 << 10)
    memory = words(1)
    with pytest.raises(ptx.Problem, match=r"takes arguments of \[8, 4\] bytes"):
        emulator.launch(
            emulator.load(kernel("")), "test", (1, 1, 1), (1, 1, 1), 0, [bytes(8)], [ptx.extent(memory, "x")]
        )


def test_kernels_are_listed(emulator):
    assert emulator.kernels(emulator.load(kernel(""))) == ["test"]
    assert ctypes.sizeof(ctypes.c_size_t) == 8
