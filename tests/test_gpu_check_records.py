"""What scripts/gpu_check and scripts/tune make of measurements: statistics, records, resumption, reports."""

import csv

import pytest

from gpu_check_modules import ABOUT

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from check_layers import LAYERS
from check_measure import MODES, TOKENS, points
from check_report import GOALS, layer_rows, short_table, write_all
from check_stats import COLD_BYTES, Timing, copies_for, geometric_mean, interleaved, median, quantile, ratio_text
from check_store import Store

# --- statistics


def test_quantiles_interpolate():
    assert median([3.0, 1.0, 2.0]) == 2.0 and median([4.0, 1.0]) == 2.5 and median([7.0]) == 7.0
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.25) == 2.0 and quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    for values, q in (([], 0.5), ([1.0], 1.5)):
        with pytest.raises(ValueError):
            quantile(values, q)


def test_a_timing_refuses_what_is_no_time():
    timing = Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (timing.median, timing.low, timing.high, timing.rounds) == (3.0, 1.8, 4.2, 5)
    for bad in ([], [0.0], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="positive seconds"):
            Timing.of(bad)
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError):
        geometric_mean([1.0, 0.0])


def test_contestants_take_turns_and_order_alternates():
    order = []
    run = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    timings = interleaved(run, 5)
    assert "".join(order) == "abccbaabccbaabc"
    assert timings["a"].rounds == 5 and timings["a"].median == 7
    with pytest.raises(ValueError, match="at least 5 rounds"):
        interleaved(run, 4)


@pytest.mark.parametrize("weight", [1, 10_000, 8 << 20, 33 << 20, 127 << 20, COLD_BYTES, 1 << 30])
def test_a_rotation_is_colder_than_the_cache(weight):
    copies = copies_for(weight, 1 << 40)
    assert copies >= 2 and copies * weight > 100e6
    with pytest.raises(ValueError, match="do not fit"):
        copies_for(weight, 2 * weight - 1)
    assert copies_for(weight, 2 * weight) == 2


def test_a_missing_figure_is_a_dash():
    assert ratio_text(2.0, 5.0) == "2.50x" and ratio_text(None, 1.0) == ratio_text(1.0, None) == "-"


# --- records


def test_a_stopped_run_is_continued(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    store.add("w4a16", "one", {"x": 1})
    store.add("w4a16", "two", {"x": 2})
    with pytest.raises(FileExistsError, match="--resume"):
        Store(tmp_path, ABOUT, resume=False)
    again = Store(tmp_path, {**ABOUT, "date": "later"}, resume=True)
    assert again.has("w4a16", "one") and not again.has("w8a16", "one") and again.stale == 0
    assert [record["x"] for record in again.records("w4a16")] == [1, 2]


@pytest.mark.parametrize("name", ["gpu", "driver", "torch", "triton", "cuda", "sources"])
def test_records_of_something_else_are_not_reused(tmp_path, name):
    Store(tmp_path, ABOUT, resume=False).add("w4a16", "one", {"x": 1})
    other = Store(tmp_path, {**ABOUT, name: "another"}, resume=True)
    assert not other.has("w4a16", "one") and other.stale == 1


def test_a_line_cut_by_a_kill_costs_that_case_only(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    store.add("a", "one", {"x": 1})
    store.add("a", "two", {"x": 2})
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text()[:-20])
    again = Store(tmp_path, ABOUT, resume=True)
    assert again.has("a", "one") and not again.has("a", "two")
    again.add("a", "two", {"x": 3})
    assert [record["x"] for record in Store(tmp_path, ABOUT, resume=True).records()] == [1, 3]
    path.write_text('{"no": "record"}\n')
    with pytest.raises(ValueError, match="line 1 is not a record"):
        Store(tmp_path, ABOUT, resume=True)


# --- reports


def measured(mode, layer, m, linear, seconds):
    return {
        "mode": mode, "layer": layer, "linear": linear, "m": m, "n": 8, "k": 8, "bytes": 1000, "flops": 10_000,
        "seconds": seconds, "tiles": {"lowbit": "t"}, "errors": {"lowbit": 1e-3}, "spread": {}, "clocks": {},
    }  # fmt: skip


def test_a_layer_is_the_sum_of_its_linears():
    records = [
        measured("w4a16", "70b", 1, linear, {"lowbit": 1e-6, "cublas bf16": 3e-6, "humming": 2e-6})
        for linear in ("qkv", "o", "gate_up", "down")
    ]
    (row,) = layer_rows(records)
    assert row["seconds"]["lowbit"] == pytest.approx(4e-6) and row["bytes"] == 4000 and row["goal"] == 3.2
    assert layer_rows(records[:3]) == [], "three of four linears are no layer"
    del records[2]["seconds"]["humming"]
    (row,) = layer_rows(records)
    assert "humming" not in row["seconds"]
    table = short_table(records)
    assert "3.00x" in table and "3.20x" in table and "humming" not in table
    assert short_table([]) == "no layer is measured completely"


def test_every_row_of_the_goals_is_measured():
    cases = {(point.mode, point.layer, point.m) for point in points()}
    assert set(GOALS) <= cases
    assert len(list(points())) == len(MODES) * len(LAYERS) * len(TOKENS) * 4


def test_the_files_of_a_run(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    store.add("correct", "a check", {"ok": True, "figure": 1e-3})
    for linear in ("qkv", "o", "gate_up", "down"):
        store.add("w4a16", linear, measured("w4a16", "8b", 1, linear, {"lowbit": 1e-6, "cublas bf16": 2.5e-6}))
    store.add("host", "call", {"text": "5 us"})
    summary = write_all(store, tmp_path)
    assert "1 of 1 passed" in summary and "2.50x" in summary and "host: call: 5 us" in summary
    with (tmp_path / "linears.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["gpu"] for row in rows} == {"a GPU"}
    assert {row["x_cublas"] for row in rows if row["contestant"] == "lowbit"} == {"2.5"}
    assert (tmp_path / "layers.csv").exists() and (tmp_path / "checks.csv").exists()
