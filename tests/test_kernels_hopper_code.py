"""The Gluon family without a GPU: what its kernel compiles to, read as PTX and machine code, and what it refuses."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from helpers import needs_gluon
from lowbit_kernels import hopper, hopper_plan
from lowbit_kernels.hopper_plan import gluon_shared_bytes, gluon_why_not, reps, runs_of_step
from lowbit_kernels.overlap import launch_options
from lowbit_kernels.tiles import Problem, Tile
from sass_figures import product_loops

pytestmark = needs_gluon()
BF16, FP16 = torch.bfloat16, torch.float16

COMPILED = [
    (Tile("gluon", 64, 256, 2, 8, 6), 4, 128, BF16, True, 1.2),
    (Tile("gluon", 32, 256, 4, 4, 4), 4, 128, BF16, False, 1.1),
    (Tile("gluon", 64, 256, 2, 8, 4), 8, 128, BF16, False, 1.5),
]


@pytest.fixture(scope="module", params=COMPILED, ids=lambda p: f"{p[0].block_m}x{p[0].block_n} {p[1]} bits")
def compiled(request):
    tile, bits, group, dtype, asymmetric, budget = request.param
    problem = Problem(4 * tile.block_m, 4096, 4096, bits, group, dtype, asymmetric)
    case = hopper.compile_case(tile, problem)
    names = list(case.signature)
    source = GluonASTSource(
        case.kernel,
        dict(case.signature),
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {**launch_options(), **case.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return tile, problem, case, kernel, budget


def memory_lines(ptx):
    wanted = r"wgmma|mbarrier|bar\.sync|ld\.shared|ldmatrix|st\.shared|cp\.async|fence|barrier\.sync"
    return [line.strip() for line in ptx.splitlines() if re.search(wanted, line) and "//" not in line.strip()[:2]]


def test_each_release_follows_a_barrier_of_its_warpgroup(compiled):
    """Only waits, barriers and arithmetic lie between the last read of a slot and its release."""
    tile, _, _, kernel, _ = compiled
    lines = memory_lines(kernel.asm["ptx"])
    releases = [i for i, line in enumerate(lines) if "mbarrier.arrive.shared" in line]
    assert len(releases) == tile.num_warps // 4
    for i in releases:
        assert lines[i - 1].startswith(("bar.sync", "barrier.sync")) and "128" in lines[i - 1]
        earlier = [line for line in lines[:i] if "wgmma" in line]
        assert "wgmma.wait_group.sync.aligned 0" in earlier[-1]


def test_weights_are_the_register_operand_and_are_never_stored(compiled):
    ptx = compiled[3].asm["ptx"]
    products = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, (.)", ptx)
    assert products and set(products) == {"{"}
    loops = ptx.split("wgmma.mma_async")[1:-1]
    assert not any("st.shared" in part and "setmaxnreg" not in part for part in loops)


def test_the_copies_bring_what_the_barrier_expects(compiled):
    """Bytes of the copies that the producer issues per step, each with its box, against the number announced."""
    tile, problem, _, kernel, _ = compiled
    announced = {int(n) for n in re.findall(r"mbarrier\.arrive\.expect_tx\S+ _, \[%r\d+\], (\d+)", kernel.asm["ptx"])}
    x = tile.block_m * 128 * 2
    words = tile.block_n * 128 * problem.bits // 8
    rows = runs_of_step(problem.group_size) * tile.block_n * (3 if problem.asymmetric else 2)
    assert announced == {x + words + rows}
    boxes = [np.prod(meta["block_size"]) * meta["elem_size"] for meta in kernel.metadata.tensordesc_meta]
    issued = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", kernel.asm["ptx"]))
    counts = [x // boxes[0], words // boxes[1], runs_of_step(problem.group_size)]
    assert issued == sum(counts) + (counts[2] if problem.asymmetric else 0)
    assert counts[0] * boxes[0] == x and counts[1] * boxes[1] == words and boxes[2] == 2 * tile.block_n
    assert gluon_shared_bytes(tile, problem) >= kernel.metadata.shared


def test_barriers_are_fenced_before_the_roles_part(compiled):
    lines = memory_lines(compiled[3].asm["ptx"])
    fence = next(i for i, line in enumerate(lines) if line.startswith("fence.proxy.async"))
    begun = max(i for i, line in enumerate(lines) if "mbarrier.init" in line)
    assert begun < fence < next(i for i, line in enumerate(lines) if "mbarrier.try_wait" in line)


def test_fragments_are_made_while_the_tensor_cores_work(compiled, tmp_path):
    """In each loop: one wait per piece, and conversions between a product's issue and its wait.

    ptxas leaves some of them behind the wait, where the other warpgroup's products run.
    """
    tile, problem, _, kernel, budget = compiled
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    loops = product_loops(sass)
    assert len(loops) == tile.num_warps // 4
    for body in loops:
        loop = [(one.opcode, one.operands) for one in body]
        products = [op for op, _ in loop if op.startswith("HGMMA")]
        assert len(products) == 8 * reps(tile)  # all 128 columns of each 64 rows, by 16
        assert sum(op.startswith("WARPGROUP.DEPBAR") for op, _ in loop) == reps(tile) * 2
        multiplying, outside, lop3 = False, 0, 0
        for op, operands in loop:
            multiplying = op.startswith("HGMMA") or (multiplying and not op.startswith("WARPGROUP.DEPBAR"))
            converts = op.startswith("LOP3") and re.search("0xf000f|0x7f007f|0x800080", operands)
            lop3 += bool(converts)
            outside += bool(converts) and not multiplying
        assert lop3 == reps(tile) * 64 // 2 * problem.bits // 4 and outside <= 0.7 * lop3
        integer = sum(op.split(".")[0] in {"LOP3", "SHF", "PRMT", "IADD3", "LEA", "IMAD", "ISETP"} and not
                      op.startswith("IMAD.MOV") for op, _ in loop)  # fmt: skip
        assert integer / (reps(tile) * 64) <= budget


# --- what it refuses


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 2}, "4 and 8 bits"),
        ({"k": 4100, "group_size": -1}, "K must be a multiple of 8"),
        ({"block_m": 8}, "block_m must be 16"),
        ({"block_m": 256}, "block_m must be 16"),
        ({"num_warps": 2}, "num_warps 4 or 8"),
        ({"block_n": 96}, "block_n must be"),
        ({"block_n": 512}, "block_n must be"),
        ({"block_m": 128}, "registers"),
        ({"group_size": 32}, "registers"),
        ({"num_stages": 1}, "num_stages must be 2 to 8"),
        ({"num_stages": 8}, "bytes of shared memory"),
        ({"split_k": 33}, "split_k must be between 1 and the 32 steps"),
        ({"m": 1 << 24, "n": 256}, "split_k must be 1 for more than 65536 output tiles"),
        ({"n": 1 << 27, "split_k": 1, "group_size": 128}, "32-bit coordinates"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(change, reason):
    problem = {"m": 64, "n": 4096, "k": 4096, "bits": 4, "group_size": 128, "dtype": BF16}
    tile = {"family": "gluon", "block_m": 64, "block_n": 256, "split_k": 2, "num_warps": 8, "num_stages": 6}
    for name, value in change.items():
        (problem if name in problem else tile)[name] = value
    assert reason in gluon_why_not(Tile(**tile), Problem(**problem))


def test_shipped_tiles_fit_and_promise_enough_shared_memory():
    for case in hopper.compile_cases():
        tile, bound = case.extra["tile"], case.extra["shared_bound"]
        assert bound * (2 if tile.num_warps == 4 else 1) <= hopper_plan.SHARED_LIMIT, case.name


def test_cpu_tensors_are_refused_before_anything_runs():
    x, tiles, scales = torch.zeros(4, 128), torch.zeros(1, 1, 16, 16, dtype=torch.int32), torch.zeros(1, 16)
    with pytest.raises(ValueError, match="CUDA device, got x on cpu"):
        hopper.hopper_matmul(
            x, tiles, scales, None, None, bits=4, group_size=128, n=16, tile=Tile("gluon", 16, 64, 1, 4, 4)
        )
