"""Host code for CUDA, run where there is no GPU: launches, workspaces, graphs, scripts/gpu_check and bench_generate.

fake_gpu.py says how, and what that shows and what not. Results are right when a launch was given the right arguments.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "eval" / "gpu_check"), str(ROOT / "eval")]

import bench_generate  # noqa: E402
import check_correct  # noqa: E402
import check_device  # noqa: E402
import check_machinery  # noqa: E402
import check_main  # noqa: E402
import check_time  # noqa: E402
import check_warm  # noqa: E402
from check_layers import random_packed, reference, relative_rms  # noqa: E402
from triton.compiler.errors import CompilationError  # noqa: E402
from tune_table import shipped_tiles  # noqa: E402

from fake_gpu import GpuTensor, fake_gpu  # noqa: E402
from helpers import needs_gluon  # noqa: E402
from lowbit_kernels import dispatch, epilogue, releases, weight_only  # noqa: E402
from lowbit_kernels.hopper_plan import gluon_why_not  # noqa: E402
from lowbit_kernels.int8 import int8_linear, int8_matmul  # noqa: E402
from lowbit_kernels.int8_tiles import HOPPER_TILES, TILES, Int8Tile, pick_tile  # noqa: E402
from lowbit_kernels.overlap import launch_options  # noqa: E402
from lowbit_kernels.table import parse_table  # noqa: E402
from lowbit_kernels.tiles import FAMILIES, HOPPER, Problem, Tile, fits  # noqa: E402

pytestmark = needs_gluon()
BF16 = torch.bfloat16
CUDA = torch.device("cuda")


@pytest.fixture
def gpu():
    with fake_gpu() as made:
        yield made


def packed_and_x(problem):
    packed = random_packed(
        problem.n, problem.k, problem.bits, problem.group_size, problem.dtype, CUDA, asymmetric=problem.asymmetric
    )
    return packed, torch.randn(problem.m, problem.k, device=CUDA).to(problem.dtype)


# --- every tile


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_every_shipped_tile_is_launched_with_the_right_arguments(arch):
    """One token and one row too (Triton makes constants of ones), odd sizes, every kind of weight in turn."""
    kinds = [(4, 128, False), (4, 32, True), (8, 64, True), (4, -1, True), (8, -1, False), (2, 64, True)]
    shapes = [(1, 1, 256), (17, 33, 256), (16, 64, 384), (67, 40, 512)]
    dtypes = [BF16, torch.float16]
    run = 0
    with fake_gpu(arch) as gpu:
        for number, tile in enumerate(shipped_tiles(arch, FAMILIES)):
            for shift in range(2):
                m, n, k = shapes[(number + shift) % len(shapes)]
                bits, group, asymmetric = kinds[(2 * number + 3 * shift + run) % len(kinds)]
                problem = Problem(m, n, k, bits, group, dtypes[(number + shift) % 2], asymmetric)
                tile = Tile(tile.family, tile.block_m, tile.block_n, 1 + shift, tile.num_warps, tile.num_stages)
                if not fits(tile, problem, arch):
                    continue
                packed, x = packed_and_x(problem)
                bias = torch.randn(n, device=CUDA) if shift else None
                out = packed(x, bias, tile=tile)
                assert isinstance(out, GpuTensor) and out.dtype == problem.dtype and out.shape == (m, n)
                assert relative_rms(out, reference(x, packed, bias)) < 4e-3, (tile, problem)
                run += 1
        assert run >= 8 and len(gpu.launches) >= run
        options = {launch.options["num_warps"] for launch in gpu.launches if launch.kernel == "weight_only_kernel"}
        assert options >= {2, 8}


def test_every_int8_tile_is_launched_with_the_right_arguments(gpu):
    for number, tile in enumerate(TILES):
        m, n, k = [(1, 1, 512), (19, 33, 100), (300, 40, 1024)][number % 3]
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=CUDA)
        x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=CUDA)
        x_scale, scales = torch.rand(m, device=CUDA), torch.rand(n, device=CUDA).to(BF16)
        for split in (1, 2) if k > tile.block_k else (1,):
            shared = type(tile)(tile.block_m, tile.block_n, tile.block_k, split, tile.num_warps, tile.num_stages)
            out = int8_matmul(x_q, x_scale, codes, scales, None, out_dtype=BF16, tile=shared)
            exact = (x_q.double() @ codes.double().t()) * x_scale.double()[:, None] * scales.double()
            assert relative_rms(out, exact) < 2e-3
    for tile in HOPPER_TILES:
        m, n, k, split = 70, 300, 400, tile.block_m // 64
        codes, x_q = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=CUDA) for rows in (n, m))
        x_scale, scales = torch.rand(m, device=CUDA), torch.rand(n, device=CUDA).to(BF16)
        zeros, sums = torch.ones(n, dtype=torch.int8, device=CUDA), x_q.sum(1, dtype=torch.int32)
        arguments = {"out_dtype": BF16, "w_zero": zeros, "row_sums": sums, "tile": replace(tile, split_k=split)}
        out = int8_matmul(x_q, x_scale, codes, scales, None, **arguments)
        exact = (x_q.double() @ (codes.double() - 1).t()) * x_scale.double()[:, None] * scales.double()
        assert relative_rms(out, exact) < 2e-3 and gpu.launches[-1].kernel == "int8_hopper_kernel"
    x = torch.randn(3, 64, device=CUDA).to(BF16)
    out = int8_linear(x, torch.ones(8, 64, dtype=torch.int8, device=CUDA), torch.ones(8, device=CUDA), None, None, None)
    assert out.shape == (3, 8) and [launch.kernel for launch in gpu.launches[-2:]] == [
        "_quantize_kernel", "_int8_matmul_kernel"
    ]  # fmt: skip


# --- a Triton whose Gluon is another


@pytest.fixture(params=["3.5.1", "3.10.0+git1a2b3c", "no module"])
def without_gluon(request, monkeypatch):
    if request.param == "no module":
        monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    else:
        monkeypatch.setattr("triton.__version__", request.param)
    releases.gluon_missing.cache_clear()
    yield request.param
    releases.gluon_missing.cache_clear()


def test_without_gluon_a_table_that_picks_it_is_served_by_triton(without_gluon, gpu, monkeypatch):
    """The same results, by other kernels; a tile in Gluon that is asked for is refused, with the reason."""
    about = {"version": 1, "gpu": "a GPU", "arch": 90, "source": "measured", "about": {"driver": "1"}}
    about["chip"] = {"multiprocessors": 132}
    any_size = {"n": None, "k": None, "m": None}
    for family, tile in (("gluon", (16, 128, 1, 4, 3)), ("scaled", (64, 128, 1, 8, 3))):
        rows = [{"bits": bits, "group": None, **any_size, "tile": [family, *tile]} for bits in (2, 4, 8)]
        int8_rows = [{**any_size, "tile": [64, 128, 128, 1, 8, 3, "gluon"]}]
        measured = parse_table({**about, "rows": rows, "int8_rows": int8_rows}, "x")
        monkeypatch.setattr("lowbit_kernels.dispatch.table_for", lambda *_, found=measured: found)
        monkeypatch.setattr("lowbit_kernels.int8_tiles.table_for", lambda *_, found=measured: found)
        dispatch._choose.cache_clear()
        pick_tile.cache_clear()
        problem = Problem(5, 48, 256, 4, 128, BF16)
        packed, x = packed_and_x(problem)
        for invariant in (False, True):
            out = packed(x, batch_invariant=invariant)
            assert relative_rms(out, reference(x, packed)) < 4e-3
        codes = torch.randint(-128, 128, (48, 256), dtype=torch.int8, device=CUDA)
        assert int8_linear(x, codes, torch.ones(48, device=CUDA), None, None, None).shape == (5, 48)
        with pytest.raises(RuntimeError, match="Gluon kernels need triton"):
            packed(x, tile=Tile(family, *tile))
    assert not {launch.kernel for launch in gpu.launches} & {"hopper_kernel", "scaled_kernel", "int8_hopper_kernel"}
    dispatch._choose.cache_clear()
    pick_tile.cache_clear()


def test_without_gluon_the_scripts_leave_it_out_and_say_so(without_gluon, capsys):
    assert not shipped_tiles(90, HOPPER) and shipped_tiles(90, ("triton",))
    assert check_device.without_gluon(("pdl",)) == ("pdl", "gluon", "scaled")
    said = capsys.readouterr().err
    assert said.startswith("left out: gluon, scaled: the Gluon kernels need triton") and said.count("\n") == 1
    version = without_gluon if without_gluon[0] == "3" else "nvidia.hopper"
    assert version in said
    assert check_device.without_gluon(HOPPER) == HOPPER and not capsys.readouterr().err


# --- what would go wrong on a GPU shows here


def test_wrong_launches_are_seen(gpu):
    """Swapped sizes, a tensor of the CPU, a grid that is none, constants that are missing."""
    problem = Problem(5, 48, 256, 4, 128, BF16)
    packed, x = packed_and_x(problem)
    tile = Tile("triton", 16, 64, 1, 4, 3)
    right = weight_only.constants(problem, tile, 90, has_bias=False)
    out = torch.empty(5, 48, dtype=BF16, device=CUDA)
    s = packed.scales_gn

    def launch(x=x, grid=(1, 1), m=5, n=48, **constants):
        weight_only.weight_only_kernel[grid](
            x, packed.tiles, s, s, s, out, s, s, s, M=m, N=n, PDL=False, **constants, num_warps=4, num_stages=3,
            **launch_options(),
        )  # fmt: skip

    launch(**right)
    assert relative_rms(out, reference(x, packed)) < 2e-3
    with pytest.raises(AssertionError):
        launch(m=48, n=5, **right)
    with pytest.raises(AssertionError, match="x_ptr is not on the GPU"):
        launch(x=x.cpu(), **right)
    with pytest.raises(AssertionError, match="not of integers"):
        launch(grid=(0, 1), **right)
    with pytest.raises(AssertionError, match="output tiles"):
        launch(grid=(2, 1), **right)
    with pytest.raises(TypeError, match="STAGES"):
        launch(**{name: value for name, value in right.items() if name != "STAGES"})
    with pytest.raises(CompilationError, match="tile_product"):
        launch(**{**right, "RUN": 96})
    with pytest.raises(RuntimeError, match="same device"):
        packed.scales_gn + torch.ones(48)


def test_descriptors_meet_the_copy_engines_rules(gpu):
    """Tensors that start anywhere are refused by name, and zeros of 64 rows, whose boxes begin at 64 bytes."""
    problem = Problem(5, 64, 256, 4, 128, BF16, True)
    packed, x = packed_and_x(problem)
    tile = Tile("gluon", 16, 128, 1, 4, 3)
    shifted = torch.empty(packed.scales_gn.numel() + 1, dtype=BF16, device=CUDA)[1:].view(packed.scales_gn.shape)
    with pytest.raises(ValueError, match="scales must start at a multiple of 16"):
        type(packed)(**{**vars(packed), "scales_gn": shifted})(x, tile=tile)
    narrow = Tile("gluon", 16, 64, 1, 4, 3)
    assert "64 rows" in gluon_why_not(narrow, problem)
    with mock.patch("lowbit_kernels.hopper.why_not", lambda *_: None), pytest.raises(AssertionError, match="128"):
        from lowbit_kernels.hopper import hopper_matmul

        hopper_matmul(
            x, packed.tiles, packed.scales_gn, packed.zeros_gn, None, bits=4, group_size=128, n=64, tile=narrow
        )


def test_counters_of_calls_and_of_graphs_do_not_meet(gpu):
    """Captured launches keep their part of the counters; calls take theirs in turn, also past the end."""
    calls = [epilogue.workspace(7, 2, 4, CUDA)[1] for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = epilogue.workspace(7, 2, 4, CUDA)[1]
    starts = [part.data_ptr() for part in (*calls, captured)]
    assert len(set(starts)) == 4 and all(start % 16 == 0 for start in starts)
    half = starts[0] + epilogue.COUNTERS // 2 * 4
    assert starts[3] == half and all(start < half for start in starts[:3])
    most = epilogue.workspace(epilogue.COUNTERS // 2 - 8, 2, 1, CUDA)[1]
    assert most.data_ptr() == starts[0], "starts over rather than reaching into the graphs' half"


def test_compiling_ahead_launches_nothing(gpu):
    packed, x = packed_and_x(Problem(5, 48, 256, 4, 128, BF16))
    with check_warm.compile_only():
        packed(x, tile=Tile("triton", 16, 64, 2, 4, 3))
    assert gpu.lowered == 1 and not gpu.launches
    packed(x, tile=Tile("triton", 16, 64, 2, 4, 3))
    assert gpu.lowered == 1 and len(gpu.launches) == 1


def test_every_kind_of_job_is_compiled_ahead(gpu):
    """What fails there is not judged there, so it would only be seen as a slow run."""
    packed, rows = Problem(16, 64, 256, 4, 128, BF16), Problem(16, 64, 256, 8, -1, BF16)
    triton, int8 = Tile("triton", 16, 64, 1, 4, 3), Int8Tile(16, 64, 128, 1, 4, 3)
    jobs = [
        check_warm.Job(packed, triton),
        check_warm.Job(packed, replace(triton, pdl=True)),
        check_warm.Job(packed, Tile("gluon", 16, 128, 1, 4, 2)),
        check_warm.Job(packed, Tile("scaled", 64, 128, 1, 8, 3)),
        check_warm.Job(packed, Tile("dequant", 1, 16)),
        check_warm.Job(packed, triton, 8),
        check_warm.Job(rows, int8),
        check_warm.Job(rows, Int8Tile(64, 128, 128, 1, 8, 2, "gluon")),
        check_warm.Job(rows, int8, 8),
        check_warm.Job(packed, replace(triton, split_k=2), atomic=True),
    ]
    for job in jobs:
        before = gpu.lowered
        assert check_warm._compile([job]) >= 1 and gpu.lowered > before, job
    assert not gpu.launches


# --- the commands


def test_gpu_check_from_beginning_to_end(tmp_path, capsys):
    """The suite with all that only a GPU has but torch.compile, and the measuring parts, on tiny layers."""
    arguments = ["--tiny", "--out", str(tmp_path), "--peers", "none", "--parts", "correct,limits,w4a16,w8a8,cold,host"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_gpu())
        stack.enter_context(mock.patch.object(check_machinery, "compiled_fullgraph", lambda *_: 0.0))
        stack.enter_context(mock.patch.object(check_correct, "RUNS", 3))
        stack.enter_context(mock.patch.object(check_time, "MOST_LAUNCHES", 2))
        stack.enter_context(mock.patch.object(check_time.host_seconds, "__defaults__", (2, 2)))
        stack.enter_context(mock.patch.object(check_time.cold_call, "__defaults__", (2,)))
        stack.enter_context(mock.patch("check_measure.TOKENS", (33,)))
        assert check_main.main(arguments) == check_main.DONE, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    checks = {record["case"] for record in records if record["part"] == "correct"}
    assert any(name.startswith("gluon bfloat16") for name in checks) and "CUDA graph capture" in checks
    assert {record["part"] for record in records} == {"correct", "limits", "w4a16", "w8a8", "cold", "host"}
    contestants = {name for record in records if record["part"] == "w4a16" for name in record["seconds"]}
    assert contestants >= {
        "lowbit",
        "lowbit gluon",
        "lowbit scaled",
        "lowbit dequant",
        "lowbit with atomics",
        "cublas bf16",
    }
    assert "w4a16" in capsys.readouterr().out


def test_tune_from_beginning_to_end(tmp_path, capsys):
    """Every case of a small plan is measured and becomes a table that the package reads; a second run has no work."""
    import tune_experts
    import tune_main
    import tune_measure

    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(fake_gpu())
        stack.enter_context(mock.patch.multiple(tune_main, SHAPES=((64, 256),), ANY=(64, 256), M_BUCKETS=(1, 40)))
        stack.enter_context(mock.patch.object(check_time, "MOST_LAUNCHES", 2))
        stack.enter_context(mock.patch.object(check_time.chip_limits, "__defaults__", (256,)))
        stack.enter_context(mock.patch.object(tune_measure, "copies_for", lambda *_: 2))
        small = {"EXPERTS": 8, "TOP": 2, "N": 64, "K": 256, "BUCKETS": ((1, 0.25), (40, None)), "ROUTINGS": 2}
        stack.enter_context(mock.patch.multiple(tune_experts, **small))
        arguments = ["--out", str(tmp_path)]
        assert tune_main.main(arguments) == tune_main.DONE, capsys.readouterr().err
        launched = len(gpu.launches)
        assert tune_main.main([*arguments, "--resume"]) == tune_main.DONE and len(gpu.launches) == launched
    table = parse_table(json.loads((tmp_path / "nvidia-h200.json").read_text()), "x")
    assert table.source == "measured" and {key[0] for key in table.series} == {2, 4, 8}
    assert set(table.int8) == {(64, 256), (None, None)} and set(table.experts) == {4, 8, "w8a8"}
    assert "grouped_kernel" in {launch.kernel for launch in gpu.launches}


def test_tune_that_stops_writes_the_table_of_what_it_has(tmp_path, capsys):
    """The shape that stands for any is measured in every width, and the next one is not begun."""
    import tune_main
    import tune_measure
    import tune_run

    measured = tune_run.Tuning.measured

    def only_first(self, part):
        return bool(part) and isinstance(part[0], tune_main.Case) and part[0].problem.n == 64 and measured(self, part)

    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_gpu())
        shapes = ((96, 256), (64, 256))
        stack.enter_context(mock.patch.multiple(tune_main, SHAPES=shapes, ANY=(64, 256), M_BUCKETS=(1,)))
        stack.enter_context(mock.patch.object(tune_run, "ANY", (64, 256)))
        stack.enter_context(mock.patch.object(check_time, "MOST_LAUNCHES", 2))
        stack.enter_context(mock.patch.object(check_time.chip_limits, "__defaults__", (256,)))
        stack.enter_context(mock.patch.object(tune_measure, "copies_for", lambda *_: 2))
        stack.enter_context(mock.patch.object(tune_run.Tuning, "measured", only_first))
        assert tune_main.main(["--out", str(tmp_path)]) == tune_main.STOPPED
    assert "--resume goes on" in capsys.readouterr().err
    table = parse_table(json.loads((tmp_path / "nvidia-h200.json").read_text()), "x")
    assert {key[2:] for key in table.series} == {(64, 256), (None, None)} and {key[0] for key in table.series} == {
        2,
        4,
        8,
    }


def test_a_kernel_that_never_ends_ends_the_run(tmp_path):
    """Whatever waits for the device cannot be interrupted: the run says which case it was, and exits."""
    import subprocess

    code = (
        "import check_run, check_correct, check_main, sys, time; check_run.HUNG_S = 1\n"
        "check_run.checks = lambda *a, **k: iter([check_correct.Check('the endless one', lambda: time.sleep(60))])\n"
        "sys.exit(check_main.main(['--interpret', '--out', sys.argv[1]]))"
    )
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval" / "gpu_check")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == check_main.FAILED and "FAILED the endless one: not finished in 1 s" in done.stderr
    assert "hung: the endless one" in done.stdout


@pytest.mark.parametrize("kind", ["bf16", "w4"])
def test_decoding_in_a_graph_moves_on(kind):
    """Nothing in the captured step waits for the device or is counted by Python: replays fill slot after slot."""
    from transformers import StaticCache

    caches, make = [], StaticCache.__init__

    def kept(self, *args, **kwargs):
        make(self, *args, **kwargs)
        caches.append(self)

    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.data cannot change what it claims to be
    try:
        with fake_gpu() as gpu, mock.patch.object(StaticCache, "__init__", kept):
            model = bench_generate.load(argparse.Namespace(shape="tiny", model=None), kind)
            prompt = torch.randint(0, 512, (2, 8), device=CUDA)
            with torch.inference_mode():
                bench_generate._one_round(model, prompt, 7, True, torch)
            filled = caches[0].layers[0].keys[0, 0].float().abs().sum(-1).ne(0)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    # the prompt, three steps before the capture, the captured one (which runs here), and a replay per token left
    assert filled.tolist() == [True] * (8 + 3 + 1 + 6) + [False] * 5
    assert bool(gpu.launches) == (kind == "w4")
