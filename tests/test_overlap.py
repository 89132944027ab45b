"""Launches that begin while the one before ends: they read and write nothing until it has, and give the same bits."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import sys  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "eval" / "gpu_check"))

import tune_main  # noqa: E402
from check_layers import random_packed  # noqa: E402

import emulated_gpu as emulation  # noqa: E402
from fake_gpu import fake_gpu  # noqa: E402
from helpers import needs_gluon  # noqa: E402
from lowbit_kernels import dispatch, grouped, grouped_int8, grouped_tiles, int8_hopper, scaled  # noqa: E402
from lowbit_kernels import table as tables  # noqa: E402
from lowbit_kernels.dispatch import choose  # noqa: E402
from lowbit_kernels.int8 import int8_linear, int8_matmul  # noqa: E402
from lowbit_kernels.int8_quantize import quantize_activations  # noqa: E402
from lowbit_kernels.int8_tiles import Int8Tile, pick_tile  # noqa: E402
from lowbit_kernels.table import parse_table, uses_pdl  # noqa: E402
from lowbit_kernels.tiles import Problem, Tile  # noqa: E402
from ptx_code import Code  # noqa: E402
from ptx_machine import Machine  # noqa: E402
from ptx_memory import GlobalMemory, Race, WrongAccess  # noqa: E402
from ptx_program import Instruction  # noqa: E402
from ptx_unit import PtxError  # noqa: E402

pytestmark = needs_gluon()
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
PACKED = [
    Tile("triton", 8, 64, 2, 2, 4, True),
    Tile("triton", 16, 128, 1, 4, 4, True),
    Tile("gluon", 16, 128, 2, 4, 2, True),
    Tile("gluon", 64, 256, 1, 8, 3, True),
    Tile("scaled", 64, 128, 2, 8, 2, True),
]
INT8 = [Int8Tile(16, 64, 128, 2, 4, 3, "triton", True), Int8Tile(64, 128, 128, 2, 8, 2, "gluon", True)]
family = {"ids": lambda tile: f"{tile.family} {tile.block_m}x{tile.block_n}"}


def run(tile, bits=4, group=128, asymmetric=True, m=5, n=72, k=1152):
    """One matmul on the emulated GPU, from one seed."""
    torch.manual_seed(0)
    if isinstance(tile, Int8Tile):
        x, codes = torch.randn(m, k, device=CUDA).to(BF16), torch.randint(-9, 9, (n, k), dtype=torch.int8, device=CUDA)
        zeros = torch.arange(n, dtype=torch.int8, device=CUDA) if asymmetric else None
        return int8_linear(x, codes, torch.rand(n, device=CUDA), zeros, None, None, tile=tile)
    packed = random_packed(n, k, bits, group, BF16, CUDA, asymmetric=asymmetric)
    return packed(torch.randn(m, k, device=CUDA).to(BF16), tile=tile)


@pytest.mark.parametrize("tile", [*PACKED, *INT8], **family)
def test_the_bits_are_those_of_a_launch_that_waits_at_its_begin(tile):
    """On the emulator, which lets a kernel that begins early prefetch, within its tensors, and nothing else."""
    with emulation.emulated_gpu(90):
        assert torch.equal(run(tile), run(replace(tile, pdl=False)))


@pytest.mark.parametrize(("bits", "group", "k"), [(4, 32, 96), (4, -1, 200), (8, 64, 192), (8, -1, 64), (8, 128, 640)])
def test_what_is_prefetched_lies_within_the_weight(bits, group, k):
    """Rows that are shorter than what is prefetched, no multiple of it, or few; the last split and the last rows."""
    with emulation.emulated_gpu(90):
        for number, tile in enumerate((PACKED[0], PACKED[2], PACKED[4], *INT8)):
            small = replace(tile, split_k=1) if k < 512 else tile
            n, columns = (8, 136)[(number + k // 8) % 2], k - k % 16 if tile in INT8 else k  # int8: rows at 16 bytes
            with mock.patch.object(scaled, "multiprocessors", lambda _: 2):
                found = run(small, bits, group, group != -1, 3, n, columns)
            assert found.isfinite().all() and found.any()


def grouped_run(pdl):
    """Four rows of three experts, one without any, packed and W8A8."""
    torch.manual_seed(1)
    ends = torch.tensor([3, 3, 4], dtype=torch.int32, device=CUDA)
    weights = [random_packed(40, 256, 4, 64, BF16, CUDA, asymmetric=True) for _ in range(3)]
    parts = [torch.stack([getattr(w, part) for w in weights]) for part in ("tiles", "scales_gn", "zeros_gn")]
    x = torch.randn(4, 256, device=CUDA).to(BF16)
    codes, scales = torch.randint(-9, 9, (3, 40, 256), dtype=torch.int8, device=CUDA), torch.rand(3, 40, device=CUDA)
    tiles = (grouped_tiles.grouped_tile, grouped_tiles.grouped_int8_tile)
    with contextlib.ExitStack() as stack:
        for module in (grouped_tiles, grouped_int8):
            stack.enter_context(mock.patch.object(module, "uses_pdl", lambda *_: pdl))
        for cached in tiles:
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        packed = grouped.grouped_matmul(x, ends, *parts, None, bits=4, group_size=64, n=40)
        return packed, grouped_int8.grouped_int8_linear(x, ends, None, codes, scales, None, None, None)


def test_experts_have_the_same_bits_too():
    with emulation.emulated_gpu(90) as gpu:
        plain, early = grouped_run(False), grouped_run(True)
        assert all(map(torch.equal, plain, early)) and all(out.any() for out in plain)
        assert [launch.options["launch_pdl"] for launch in gpu.launches] == [False] * 3 + [True] * 3


def waits(machine):
    return [i for i, one in enumerate(machine.program.instructions) if one.opcode[:2] == ("griddepcontrol", "wait")]


@pytest.mark.parametrize("tile", [*PACKED, *INT8], **family)
def test_the_wait_is_missed_when_it_is_taken_out(tile):
    """In each kernel of the launch: the matmul's, and the one that prepares activations."""
    emulation._machines.clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(emulation.emulated_gpu(90))
        for module in (scaled, int8_hopper):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda _: 2))
        run(tile)
        machines = [machine for machine, _ in emulation._machines.values()]
        assert len(machines) == (2 if tile.family == "scaled" or isinstance(tile, Int8Tile) else 1)
        for machine in machines:
            (place,) = waits(machine)
            one = machine.program.instructions[place]
            machine.program.instructions[place] = Instruction(None, False, ("fence",), (), "taken out")
            machine.code = Code(machine.program)
            with pytest.raises((Race, PtxError), match=r"before griddepcontrol\.wait"):
                run(tile)
            machine.program.instructions[place], machine.code = one, None
            machine.code = Code(machine.program)
    emulation._machines.clear()


def test_a_kernel_that_lets_the_next_begin_must_wait_itself():
    """Whoever comes after relies on it: that a kernel has ended says that all before it have."""
    ptx = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0) .reqntid 32
{
    griddepcontrol.launch_dependents;
    ret;
}
"""
    import random

    with pytest.raises(PtxError, match=r"launch_dependents before griddepcontrol\.wait"):
        Machine(ptx, 0).run((1, 1, 1), [0], GlobalMemory(), order=random.Random(0))
    ptx = ptx.replace("    griddepcontrol", "    bra $END;\n    griddepcontrol").replace("    ret;", "$END:\n    ret;")
    with pytest.raises(PtxError, match=r"ends without griddepcontrol\.wait"):
        Machine(ptx, 0).run((1, 1, 1), [0], GlobalMemory(), order=random.Random(0))


def test_a_prefetch_outside_of_the_tensors_is_seen():
    emulation._machines.clear()
    with emulation.emulated_gpu(90):
        run(PACKED[0])
        (machine,) = [machine for machine, _ in emulation._machines.values()]
        for one in machine.program.instructions:
            if one.opcode[:1] == ("prefetch",):
                object.__setattr__(one.operands[0], "offset", 1 << 30)
        machine.code = Code(machine.program)
        with pytest.raises(WrongAccess, match="a prefetch"):
            run(PACKED[0])
    emulation._machines.clear()


# --- who launches so


def test_launches_say_so_and_others_do_not():
    with fake_gpu() as gpu:
        for tile in (*PACKED, *INT8):
            for pdl in (True, False):
                before = len(gpu.launches)
                run(replace(tile, pdl=pdl))
                new = gpu.launches[before:]
                assert new and all(launch.options["launch_pdl"] is pdl for launch in new), (tile, pdl)
                assert all(launch.constants["PDL"] is pdl for launch in new)


def table(**changes):
    content = json.loads((ROOT / "kernels" / "lowbit_kernels" / "tables" / "nvidia-h200.json").read_text())
    return {**content, **changes}


def test_a_table_says_so_for_all_fused_launches():
    """Shipped tables do not: nobody has measured it. A table that does changes no tile otherwise."""
    assert not any(known.pdl for known in tables.tables().values())
    problems = [Problem(m, 8192, 8192, 4, 128, BF16) for m in (1, 16, 64, 4096)]
    plain, plain8 = (
        [choose(p, 90, gpu_name="NVIDIA H200") for p in problems],
        pick_tile(1, 8192, 8192, 90, "NVIDIA H200"),
    )
    known = {**tables.tables(), "NVIDIA H200": parse_table(table(pdl=True), "test")}
    caches = (dispatch._choose, uses_pdl, pick_tile, grouped_tiles.grouped_tile)
    with mock.patch.object(tables, "tables", lambda: known):
        for cached in caches:
            cached.cache_clear()
        for problem, tile in zip(problems, plain, strict=True):
            found = choose(problem, 90, gpu_name="NVIDIA H200")
            assert found == replace(tile, pdl=tile.family != "dequant"), problem
        assert pick_tile(1, 8192, 8192, 90, "NVIDIA H200") == replace(plain8, pdl=True)
        assert grouped_tiles.grouped_tile(problems[0], 8, 90, gpu_name="NVIDIA H200").pdl
        assert uses_pdl(90, "NVIDIA H200") and not uses_pdl(90) and not uses_pdl(80, "NVIDIA H200")
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("value", [1, "true", None])
def test_a_table_says_true_or_false(value):
    with pytest.raises(ValueError, match="pdl must be true or false"):
        parse_table(table(pdl=value), "test")


def test_older_gpus_and_kernels_that_cannot_refuse_it():
    with fake_gpu(80):
        with pytest.raises(ValueError, match=r"programmatic dependent launch needs .*sm_90"):
            run(PACKED[0])
        with pytest.raises(ValueError, match="programmatic dependent launch needs sm_90, got sm_80"):
            run(INT8[0])
        with pytest.raises(ValueError, match="programmatic dependent launch needs sm_90, got sm_80"):
            quantize_activations(torch.randn(2, 64, device=CUDA), pdl=True)
    with fake_gpu(90):
        packed, x = random_packed(64, 128, 4, 128, BF16, CUDA), torch.randn(3, 128, device=CUDA).to(BF16)
        with pytest.raises(ValueError, match="a fused family"):
            packed(x, tile=Tile("dequant", 1, 16, pdl=True))
        codes = torch.zeros(8, 64, dtype=torch.int8, device=CUDA)
        with pytest.raises(ValueError, match="gluon"):
            int8_matmul(codes, torch.ones(8, device=CUDA), codes, torch.ones(8, device=CUDA), None, out_dtype=BF16,
                        tile=replace(INT8[1], family="gluons"))  # fmt: skip


# --- measuring it


@pytest.mark.parametrize(("ratios", "expected"), [([0.8, 0.95], True), ([0.99, 0.99], False), ([1.1, 0.9], False)])
def test_tune_turns_it_on_where_it_is_faster_in_the_mean(ratios, expected, tmp_path):
    from check_store import Store

    about = {"gpu": "a GPU", "arch": 90, "driver": "", "torch": "", "triton": "", "date": "", "sources": "s"}
    store = Store(tmp_path, about, resume=False)
    times = [[list(vars(tune_main.FLOOR).values()), 3e-6], [list(vars(PACKED[0]).values()), 1e-6]]
    for bits, n, k, m in tune_main.cases((2, 4, 8)):
        pdl = ratios[m > 1] if m in (1, 4) else None
        record = {"bits": bits, "n": n, "k": k, "m": m, "times": times, "dense": 5e-6, "pdl": pdl}
        store.add("tune", f"{bits} bits {n}x{k} M={m}", record)
    made = tune_main.make_table(store, store.about, 132, 4e12)
    assert made["pdl"] is expected and set(made["about"]["pdl_over_plain"]) == set(ratios)
    assert parse_table(made, "made").pdl is expected


def test_tune_tries_it_with_few_tokens_on_one_shape():
    options = tune_main.parse(["--dry-run", "--bits", "4,8,2,w8a8"])
    tried = [case.problem for case in tune_main.work(options, 90, 132, BF16) if case.pdl]
    assert {(p.n, p.k) for p in tried} == {tune_main.ANY} and {p.m for p in tried} == set(tune_main.PDL_TOKENS)
    assert not any(case.pdl for case in tune_main.work(options, 80, 108, BF16))
    left_out = tune_main.parse(["--dry-run", "--bits", "4", "--without", "pdl"])
    assert not any(case.pdl for case in tune_main.work(left_out, 90, 132, BF16))
