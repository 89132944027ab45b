"""The choice of a tile: always one that fits, for every problem; pure; and tables that are what they claim to be."""

import copy
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from lowbit_kernels.dispatch import INVARIANT_TOKENS, choose, fill_split
from lowbit_kernels.table import parse_table, table_for, tables
from lowbit_kernels.tiles import Problem, Tile, cdiv, fits, narrowed, step_columns
from lowbit_kernels.weight_only import constants, options

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "kernels" / "lowbit_kernels" / "tables"
sys.path.append(str(ROOT / "eval" / "gpu_check"))

FP16 = torch.float16
ARCHS = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
MODEL_SHAPES = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),  # Llama 3 8B, fused
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),  # Llama 3 70B, fused
    (4864, 896), (896, 4864), (1152, 896), (128, 896),  # Qwen2.5 0.5B
    (11008, 2048), (512, 2048), (5120, 27648), (128256, 4096), (64, 64), (8, 32), (3, 7), (1, 1),
)  # fmt: skip
TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 255, 256, 257, 1000, 4096, 10**6)


def groups(k):
    return [size for size in (32, 64, 128) if k % size == 0] + [-1]


@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch invariant"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_tile_always_fits(arch, invariant):
    dtypes = (torch.float16,) if arch < 80 else (torch.float16, torch.bfloat16)
    for (n, k), m, bits, dtype in itertools.product(MODEL_SHAPES, TOKENS, (2, 4, 8), dtypes):
        for group, asymmetric in itertools.product(groups(k), (False, True)):
            problem = Problem(m, n, k, bits, group, dtype, asymmetric)
            tile = choose(problem, arch, batch_invariant=invariant)
            assert fits(tile, problem, arch), (problem, tile)
            assert tile.split_k >= 1


@pytest.mark.parametrize("name", [None, "NVIDIA H200", "a GPU without a table"])
def test_every_small_shape_has_a_tile(name):
    """Each m, n and k up to 40, and around powers of two."""
    sizes = [*range(1, 40, 3), 63, 64, 65, 127, 128, 129, 257]
    for m, n, k in itertools.product(sizes, sizes, sizes):
        problem = Problem(m, n, k, 4, -1, torch.float16)
        assert fits(choose(problem, 90, gpu_name=name), problem, 90)


def test_it_is_pure():
    """The same arguments give the same tile, in any order of calls, and nothing of the machine is read."""
    problems = [Problem(m, n, k, 4, 128, torch.bfloat16) for m in (1, 64, 300) for n, k in MODEL_SHAPES[:8]]
    first = [choose(problem, 90, gpu_name="NVIDIA H200") for problem in problems]
    from lowbit_kernels import dispatch

    dispatch._choose.cache_clear()
    tables.cache_clear()
    again = [choose(problem, 90, gpu_name="NVIDIA H200") for problem in reversed(problems)]
    assert again[::-1] == first and not torch.cuda.is_initialized()


def test_batch_invariance_does_not_look_at_m():
    for (n, k), bits, arch in itertools.product(MODEL_SHAPES[:12], (2, 4, 8), (80, 90, 120)):
        problem = Problem(1, n, k, bits, -1, torch.float16)
        tiles = {choose(replace(problem, m=m), arch, batch_invariant=True) for m in TOKENS}
        assert len(tiles) == 1 and tiles.pop().family != "dequant"
    assert INVARIANT_TOKENS == 16


def test_more_tokens_take_wider_tiles():
    """Along M the token tile of the fused families never shrinks, and once cuBLAS wins it keeps winning."""
    for (n, k), bits, arch in itertools.product(MODEL_SHAPES[:8], (4, 8), (80, 86, 89, 90, 100, 120)):
        tiles = [choose(Problem(m, n, k, bits, 128, torch.bfloat16), arch) for m in TOKENS[1:]]
        widths = [10**9 if tile.family == "dequant" else tile.block_m for tile in tiles]
        assert widths == sorted(widths), (n, k, bits, arch, tiles)
        assert tiles[0].family != "dequant" and tiles[0].block_m <= 16


@pytest.mark.parametrize("family, tile", [("gluon", [64, 256, 0, 8, 6]), ("scaled", [128, 256, 0, 8, 4])])
def test_a_measured_table_may_pick_what_the_copy_engine_feeds(family, tile, monkeypatch):
    """Where it fits; for scales that it cannot read, widths and rows that it has not, older GPUs there is another."""
    from lowbit_kernels import dispatch

    rows = [
        {"bits": bits, "group": None, "n": None, "k": None, "m": None, "tile": [family, *tile]} for bits in (2, 4, 8)
    ]
    table = parse_table({**GOOD, "rows": rows}, "x")
    monkeypatch.setattr(dispatch, "table_for", lambda *_: table)
    choose = dispatch._choose.__wrapped__
    problem = Problem(300, 4096, 4096, 4, 128, torch.bfloat16)
    assert choose(problem, 90, None, False, True).family == family
    others = [
        choose(problem, 90, None, False, False),
        choose(replace(problem, bits=2), 90, None, False, True),
        choose(replace(problem, k=4100, group_size=-1), 90, None, False, True),
        choose(problem, 80, None, False, True),
        choose(problem, 90, None, True, False),
    ]
    archs = [90, 90, 90, 80, 90]
    problems = [problem, replace(problem, bits=2), replace(problem, k=4100, group_size=-1), problem, problem]
    for other, arch, wanted in zip(others, archs, problems, strict=True):
        assert other.family in ("triton", "dequant") and fits(other, wanted, arch), other
    assert others[-1].family == "triton", "the batch-invariant mode never takes cuBLAS"


def test_a_few_tokens_fill_the_gpu():
    """At M = 1 no layer of a large model leaves half of the multiprocessors without a program."""
    for n, k in MODEL_SHAPES[:8]:
        problem = Problem(1, n, k, 4, 128, torch.bfloat16)
        tile = choose(problem, 90, gpu_name="NVIDIA H200")
        assert cdiv(n, tile.block_n) * tile.split_k >= 66, (n, k, tile)


def test_splitting_leaves_each_program_work():
    for n, k, m in itertools.product((16, 1024, 28672), (128, 4096, 28672), (1, 64, 1024)):
        problem = Problem(m, n, k, 4, 128, torch.bfloat16)
        tile = Tile("triton", 16, 64, 1, 4, 4)
        split = fill_split(tile, problem, 90, 132)
        assert 1 <= split <= 16 and (split == 1 or cdiv(k, step_columns(4)) // split >= 4)
        if cdiv(m, 16) * cdiv(n, 64) >= 4 * 132 * 4:
            assert split == 1, "splitting cannot help a GPU that is full several times over"


def test_an_impossible_problem_names_the_reason():
    with pytest.raises(ValueError, match=r"sm_75 has no tensor-core instruction for torch.bfloat16"):
        choose(Problem(1, 64, 64, 4, 32, torch.bfloat16), 75)
    with pytest.raises(ValueError, match=r"bits must be one of .* got 3"):
        choose(Problem(1, 64, 64, 3, 32, torch.float16), 90)
    with pytest.raises(ValueError, match=r"sm_70"):
        choose(Problem(1, 64, 64, 4, 32, torch.float16), 70)


# --- the tables


def test_a_gpu_without_a_table_takes_the_nearest_architecture():
    assert table_for(90, "NVIDIA H200").gpu == "NVIDIA H200"
    assert table_for(90, "NVIDIA H100 PCIe").gpu == "sm_90"
    for arch, taken in ((75, 80), (80, 80), (87, 86), (89, 89), (103, 100), (121, 120)):
        assert table_for(arch).gpu == f"sm_{taken}"
    assert {f"sm_{arch}" for arch in (80, 86, 89, 90, 100, 120)} < set(tables())


def test_the_tables_are_what_the_tuner_would_write():
    """A predicted table is the model's, to the letter: nobody edited it, and the model has not moved on without it."""
    from tune_predict import predicted_tables

    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    predicted = predicted_tables()
    for name, text in written.items():
        if json.loads(text)["source"] == "predicted":
            assert text == predicted[name], f"{name}: run scripts/tune --predict"
    assert set(predicted) <= set(written)


def test_a_measured_table_says_where():
    for path in FOLDER.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"driver", "torch", "triton", "date"} if content["source"] == "measured" else {"model", "chip"}
        assert wanted <= set(content["about"]), path.name


def test_only_tiles_that_the_gate_compiles_are_shipped():
    from tune_table import shipped_tiles

    for path in FOLDER.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        shipped = set(shipped_tiles(content["arch"], ("triton", "gluon", "scaled")))
        for row in content["rows"]:
            family, block_m, block_n, _, warps, stages = row["tile"]
            assert family == "dequant" or Tile(family, block_m, block_n, 1, warps, stages) in shipped, (path.name, row)


GOOD = {
    "version": 1,
    "gpu": "a GPU",
    "arch": 90,
    "source": "measured",
    "about": {"driver": "1"},
    "chip": {"multiprocessors": 132},
    "rows": [
        {"bits": bits, "group": None, "n": None, "k": None, "m": m, "tile": ["triton", 16, 64, 0, 4, 4]}
        for bits in (2, 4, 8)
        for m in (16, None)
    ],
}


def test_a_good_table_is_read():
    table = parse_table(GOOD, "x.json")
    assert table.multiprocessors == 132 and len(table.series) == 3
    assert [row.m for row in table.series[4, None, None, None]] == [16, None]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("chip"), "exactly the keys"),
        (lambda t: t.update(more=1), "exactly the keys"),
        (lambda t: t.update(version=2), "version 1"),
        (lambda t: t.update(source="remembered"), "'remembered'"),
        (lambda t: t.update(about={}), "with an 'about'"),
        (lambda t: t.update(arch="90"), "positive integers"),
        (lambda t: t["chip"].pop("multiprocessors"), "positive integers"),
        (lambda t: t["rows"].pop(), r"series \(8, None, None, None\) ends at m = 16"),
        (lambda t: t["rows"].__delitem__(slice(4, 6)), "no series for 8 bits"),
        (lambda t: t["rows"][0].update(m=None), "m must rise"),
        (lambda t: t["rows"][0].update(bits=3), "bits must be"),
        (lambda t: t["rows"][0].update(group=16), "group"),
        (lambda t: t["rows"][0].update(n=4096), "n and k must be given together"),
        (lambda t: t["rows"][0].update(m=0), "positive integers or null"),
        (lambda t: t["rows"][0].update(tile=["cuda", 16, 64, 0, 4, 4]), "tile must be"),
        (lambda t: t["rows"][0].update(tile=["triton", 16, 64, 0, 4]), "tile must be"),
        (lambda t: t["rows"][0].update(tile=["triton", 16, 64, 0, 0, 4]), "sizes must be positive"),
        (lambda t: t["rows"][0].update(tile=["triton", 16, 64, None, 4, 4]), "sizes must be positive"),
        (lambda t: t["rows"][0].pop("tile"), "a row has exactly"),
    ],
)
def test_a_bad_table_is_refused(change, message):
    content = copy.deepcopy(GOOD)
    change(content)
    with pytest.raises(ValueError, match=f"x.json.*{message}"):
        parse_table(content, "x.json")


# --- how a table is made from times

FLOOR = Tile("dequant", 1, 16)
FUSED, OTHER = Tile("triton", 16, 64, 2, 4, 4), Tile("triton", 64, 128, 1, 8, 3)


def test_nothing_slower_than_the_floor_is_picked():
    from tune_table import pick

    assert pick(1, {FUSED: 1e-5, OTHER: 3e-5, FLOOR: 9e-5}, 3e-5).tile == FUSED
    assert pick(512, {FUSED: 9e-5, OTHER: 5.01e-5, FLOOR: 5e-5}, 4e-5).tile == FLOOR
    within_noise = pick(512, {OTHER: 4.99e-5, FLOOR: 5e-5}, 4e-5)
    assert within_noise.tile == FLOOR and within_noise.over_dense == pytest.approx(0.8)
    faster = pick(256, {OTHER: 4e-5, FLOOR: 5e-5}, 6e-5)
    assert faster.tile == OTHER and faster.over_dense == pytest.approx(1.5) and faster.over_floor == pytest.approx(1.25)


@pytest.mark.parametrize("times, dense", [({FUSED: 1.0}, 1.0), ({FLOOR: 0.0}, 1.0), ({FLOOR: float("nan")}, 1.0),
                                          ({FLOOR: 1.0}, float("inf"))])  # fmt: skip
def test_times_that_cannot_be_are_refused(times, dense):
    from tune_table import pick

    with pytest.raises(ValueError, match="M = 4"):
        pick(4, times, dense)


def test_series_are_merged_and_end_open():
    from tune_table import pick, rows_of

    picks = [pick(m, {FUSED: 1e-5, FLOOR: 9e-5 / m}, 3e-5) for m in (16, 1, 4)]
    rows = rows_of(picks, bits=4, group=128, n=4096, k=4096)
    assert [(row["m"], row["tile"]) for row in rows] == [
        (4, ["triton", 16, 64, 2, 4, 4]),
        (None, ["dequant", 1, 16, 1, 4, 4]),
    ]
    generic = rows_of(picks, bits=4)
    assert generic[0]["tile"] == ["triton", 16, 64, 0, 4, 4], "a split for one shape says nothing about another"


def test_a_measured_shape_keeps_its_split_and_others_fill():
    from lowbit_kernels import dispatch, table

    rows = [
        {"bits": 4, "group": 128, "n": 4096, "k": 4096, "m": None, "tile": ["triton", 16, 64, 3, 4, 4]},
        *GOOD["rows"],
    ]
    made = parse_table({**GOOD, "rows": rows}, "x.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "tables", lambda: {"a GPU": made})
        dispatch._choose.cache_clear()
        assert choose(Problem(1, 4096, 4096, 4, 128, torch.float16), 90, gpu_name="a GPU").split_k == 3
        near = choose(Problem(1, 4096, 2048, 4, 128, torch.float16), 90, gpu_name="a GPU")
        assert near.split_k == fill_split(near, Problem(1, 4096, 2048, 4, 128, torch.float16), 90, 132)
    dispatch._choose.cache_clear()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tile_is_narrowed_for_small_groups_alone(arch):
    shapes = ((8, 64, 2, 4), (8, 128, 4, 4), (16, 64, 2, 4), (32, 128, 4, 3), (64, 128, 8, 3), (128, 128, 8, 3))
    for (m, n, warps, stages), size, bits, asymmetric in itertools.product(
        shapes, (32, 64, 128, -1), (2, 4, 8), (False, True)
    ):
        tile, problem = Tile("triton", m, n, 2, warps, stages), Problem(m, n, 4096, bits, size, FP16, asymmetric)
        found = narrowed(tile, problem, arch)
        if size not in (32, 64):
            assert found == tile
        assert found.block_m <= tile.block_m and found.block_n <= tile.block_n
        assert (found.split_k, found.num_stages, found.pdl) == (tile.split_k, tile.num_stages, tile.pdl)
        assert found.block_n >= 16 * found.num_warps, "a warp multiplies 16 rows at least"
        assert narrowed(found, problem, arch) == found
    for family in ("gluon", "scaled", "dequant"):
        tile = Tile(family, 128, 128, 1, 8, 4)
        assert narrowed(tile, Problem(128, 4096, 4096, 4, 32, FP16), arch) == tile


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_x_is_loaded_a_run_at_a_time_where_that_is_16_bytes_for_each_thread(arch):
    """Or by mma.sync, which can split it in registers, all columns of the step."""
    seen = set()
    for (m, n, warps), size, bits in itertools.product(
        ((8, 64, 2), (8, 128, 4), (16, 64, 2), (32, 128, 4), (64, 128, 8)), (32, 64, 128, -1), (2, 4, 8)
    ):
        tile = Tile("triton", m, n, 1, warps, 3)
        found = constants(Problem(m, n, 4096, bits, size, FP16), tile, arch, has_bias=False)
        step, wide = step_columns(bits), m * found["RUN"] * 2 // (32 * warps) >= 16
        assert found["PART"] == (found["RUN"] if wide or not found["FOR_MMA"] else step)
        seen.add(found["PART"] == step and found["RUN"] < step)
    assert seen == {False, True}


def test_a_limit_of_registers_leaves_room_for_a_program_and_is_one_that_ptxas_takes():
    limits = set()
    for (m, n, warps), size, bits in itertools.product(
        ((8, 64, 2), (8, 128, 4), (16, 64, 2), (16, 64, 4), (32, 128, 4), (32, 128, 8), (64, 128, 8)),
        (32, 64, 128, -1),
        (2, 4, 8),
    ):
        tile = Tile("triton", m, n, 1, warps, 3)
        found = options(Problem(m, n, 4096, bits, size, FP16), tile)
        limit = found.pop("maxnreg", 255)
        assert found == {"num_warps": warps, "num_stages": 3}
        assert limit <= 255 and limit * 32 * warps <= 65_536
        limits.add(limit)
    assert len(limits) > 1 and 255 in limits


@pytest.mark.parametrize("name", [None, "NVIDIA H200"])
def test_small_groups_get_no_tile_that_would_spill(name):
    """Sums of 128 tokens beside a scale and a zero per 32 or 64 columns are more than the registers."""
    widest = {}
    for size, m, bits in itertools.product((32, 64, 128), (256, 512, 1024, 4096), (2, 4, 8)):
        tile = choose(Problem(m, 4096, 4096, bits, size, torch.bfloat16, True), 90, gpu_name=name)
        if tile.family == "triton":
            widest[size] = max(widest.get(size, 0), tile.block_m)
    assert widest[32] == widest[64] == 64 and widest[128] == 128
