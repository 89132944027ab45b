"""The Triton kernels compile for every supported GPU without one: no spills, shared memory within each GPU's limit."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lowbit_kernels.matmul import _packed_matmul_kernel  # noqa: E402
from lowbit_kernels.tiles import SHARED_LIMIT, fits, pick_tile, shared_bytes  # noqa: E402

CAPABILITIES = (80, 86, 89, 90, 100, 120)
# (tokens, bits, group size, K): each row of the tile table, each width, groups that are one step, several, or the row
SHAPES = [
    (1, 4, 128, 4096),
    (20, 4, 32, 4096),
    (64, 8, 128, 4096),
    (300, 4, 128, 4096),
    (1, 8, -1, 4100),
    (1, 2, 64, 4096),
]
POINTERS = ("x_ptr", "words_ptr", "scales_ptr", "zeros_ptr", "bias_ptr", "out_ptr")


def resources(capability, dtype, asymmetric, m, bits, group_size, k, cubin_path):
    """Compile one kernel; (registers, bytes of stack, bytes of local memory, bytes of shared memory, the tile)."""
    tile = pick_tile(m, 4096, k, bits, group_size)
    constants = {
        "K": k,
        "BITS": bits,
        "GROUP": group_size,
        "HAS_ZEROS": asymmetric,
        "HAS_BIAS": True,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    types = dict.fromkeys(POINTERS, f"*{dtype}") | {"words_ptr": "*i32", "zeros_ptr": "*i32"}
    names = _packed_matmul_kernel.arg_names
    source = ASTSource(
        _packed_matmul_kernel,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin_path.write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", cubin_path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found, usage.stdout + usage.stderr
    return (*map(int, found.groups()), kernel.metadata.shared, tile)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability, dtype, asymmetric, tmp_path):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        for m, bits, group_size, k in SHAPES:
            case = f"sm_{capability} {dtype} m={m} bits={bits} group={group_size}"
            _, stack, local, shared, tile = resources(
                capability, dtype, asymmetric, m, bits, group_size, k, tmp_path / "kernel.cubin"
            )
            assert stack == local == 0, f"{case}: {stack} B of stack and {local} B of local memory are spills"
            assert shared <= shared_bytes(tile, bits) <= SHARED_LIMIT, f"{case}: {shared} B of shared memory"


def test_a_tile_is_found_for_every_shape():
    for m, n, k, bits, group in itertools.product(
        (1, 16, 17, 33, 129, 10**6), (1, 33, 8193, 10**6), (128, 8192), (2, 4, 8), (32, 64, 128, -1)
    ):
        tile = pick_tile(m, n, k, bits, group)
        assert fits(tile, bits, group) and tile == pick_tile(m, n, k, bits, group)
    for k in (1, 7, 33, 100, 129):
        assert fits(pick_tile(1, 64, k, 4, -1), 4, -1)


def test_a_spill_would_be_seen(tmp_path):
    """The tile that kernels/README.md lists as spilling does: what the test above reads is not always zero."""
    with triton.knobs.cache.scope(), pytest.MonkeyPatch.context() as patch:
        triton.knobs.cache.dir = str(tmp_path / "cache")
        from lowbit_kernels.tiles import Tile

        patch.setitem(globals(), "pick_tile", lambda *_: Tile(128, 128, 64, 8, 3))
        _, stack, *_ = resources(80, "fp16", False, 300, 4, 128, 4096, tmp_path / "kernel.cubin")
    assert stack > 0
