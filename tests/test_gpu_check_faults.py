"""What scripts/gpu_check and scripts/tune do on a GPU that fails them: a tile, a peer, a tool, the whole context.

On the fake GPU (fake_gpu.py). Time on a GPU is short and dear: what is measured is kept, who is to blame is named, and
what does not depend on it goes on.
"""

import contextlib
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

from gpu_check_modules import ABOUT, ROOT

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import check_correct
import check_device
import check_machinery
import check_main
import check_measure
import check_peers
import check_run
import check_time
import check_warm
import tune_main
import tune_measure
import tune_predict
import tune_run
from check_report import write_all
from check_store import Store

from fake_gpu import fake_gpu
from helpers import needs_gluon
from lowbit_kernels.table import parse_table
from lowbit_kernels.tiles import Tile
from test_gpu_check_records import measured

pytestmark = needs_gluon()
BAD = Tile("triton", 16, 64, 1, 2, 4)


@pytest.fixture
def gpu():
    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(fake_gpu())
        stack.enter_context(mock.patch.object(check_time, "MOST_LAUNCHES", 2))
        stack.enter_context(mock.patch.object(check_time.chip_limits, "__defaults__", (256,)))
        yield gpu


# --- scripts/tune


@pytest.fixture
def small_plan(gpu, monkeypatch, tmp_path):
    """One shape, one number of tokens, in every width and W8A8; tables are installed in a folder of their own."""
    monkeypatch.setattr(tune_main, "SHAPES", ((64, 256),))
    monkeypatch.setattr(tune_main, "ANY", (64, 256))
    monkeypatch.setattr(tune_main, "M_BUCKETS", (4,))
    monkeypatch.setattr(tune_run, "ANY", (64, 256))
    monkeypatch.setattr(tune_measure, "copies_for", lambda *_: 2)
    monkeypatch.setattr(tune_run, "TABLES", tmp_path / "tables")
    (tmp_path / "tables").mkdir()
    return tmp_path


def tune(folder, *arguments, bits="4,8,2,w8a8"):
    return tune_main.main(["--out", str(folder / "out"), "--bits", bits, *arguments])


def table_of(folder):
    return json.loads((folder / "out" / "nvidia-h200.json").read_text())


def failing(monkeypatch, error, device=lambda: None):
    """Make 4-bit timers of BAD raise, and the device answer as given from then on."""
    make, failed = tune_measure.GraphTimer, []

    def timer(calls):
        if calls[0].keywords.get("tile") == BAD and getattr(calls[0].func, "bits", 0) == 4:
            failed.append(1)
            raise error
        return make(calls)

    def synchronize(*_):
        if failed:
            device()

    monkeypatch.setattr(tune_measure, "GraphTimer", timer)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return failed


def test_a_tile_that_cannot_be_launched_is_left_out_and_named(small_plan, monkeypatch, capsys):
    failing(monkeypatch, RuntimeError("out of resources"))
    assert tune(small_plan, "--install") == tune_main.FAILED
    out, err = capsys.readouterr()
    assert "FAILED 4 bits 64x256 M=4, " + repr(BAD) in err and "out of resources" in out
    assert parse_table(table_of(small_plan), "x").source == "measured"
    assert (small_plan / "tables" / "nvidia-h200.json").exists() and len(list((small_plan / "tables").iterdir())) == 1
    records = Store(small_plan / "out", check_device.about(torch.device("cuda"), tables=False), resume=True)
    (case,) = (record for record in records.records("tune") if record["bits"] == 4)
    assert list(vars(BAD).values()) not in [tile for tile, _ in case["times"]] and len(case["times"]) > 1


def test_after_a_lost_context_resume_goes_on_without_the_tile(small_plan, monkeypatch, capsys):
    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    failed = failing(monkeypatch, RuntimeError("illegal memory access"), dead)
    assert tune(small_plan) == tune_main.FAILED
    err = capsys.readouterr().err
    assert "the CUDA context is lost after 4 bits 64x256 M=4, " + repr(BAD) in err and "no table yet" in err
    del failed[:]
    assert tune(small_plan, "--resume") == tune_main.FAILED, "the tile that failed is still named"
    assert not failed, "it is not tried again"
    assert parse_table(table_of(small_plan), "x").source == "measured"


def test_a_tile_that_never_ends_is_skipped_by_resume(small_plan):
    code = (
        "import sys, time, contextlib, torch\n"
        "import test_gpu_check_faults as t, tune_run, tune_main, tune_measure, check_time\n"
        "from fake_gpu import fake_gpu\n"
        "tune_main.SHAPES, tune_main.ANY, tune_main.M_BUCKETS = ((64, 256),), (64, 256), (4,)\n"
        "tune_run.ANY, tune_measure.copies_for, check_time.MOST_LAUNCHES = (64, 256), lambda *_: 2, 2\n"
        "check_time.chip_limits.__defaults__ = (256,)\n"
        "make = tune_measure.GraphTimer\n"
        "def timer(calls):\n"
        "    if calls[0].keywords.get('tile') == t.BAD and calls[0].func.bits == 4: time.sleep(100)\n"
        "    return make(calls)\n"
        "tune_measure.GraphTimer, tune_run.HUNG_S = timer, 8\n"
        "with fake_gpu(): sys.exit(tune_main.main(sys.argv[1:]))\n"
    )
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval" / "gpu_check"), str(ROOT / "tests")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"]
    command += ["--bits", "4,8,2", "--out", str(small_plan / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == tune_main.FAILED and f"{BAD!r}: not finished in 8 s" in done.stderr, done.stderr[-2000:]
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=200)
    assert done.returncode == tune_main.FAILED and f"{BAD!r}: not finished" in done.stdout, done.stderr[-2000:]
    assert parse_table(table_of(small_plan), "x").source == "measured"


@pytest.mark.parametrize("bits", ["w8a8", "4"])
def test_widths_that_were_not_asked_for_keep_their_rows(small_plan, bits):
    assert tune(small_plan, bits=bits) == tune_main.DONE
    made, before = table_of(small_plan), tune_predict.current_table(90, "NVIDIA H200")
    kept = [row for row in made["rows"] if str(row["bits"]) != bits]
    assert kept == [row for row in before["rows"] if str(row["bits"]) != bits]
    assert set(made["about"]["rows_kept"]) == {"2", "4", "8"} - {bits} and bool(made.get("int8_rows")) == (
        bits == "w8a8"
    )


def test_a_table_that_is_installed_does_not_make_its_own_records_stale(tmp_path, monkeypatch):
    kernels = tmp_path / "kernels" / "lowbit_kernels"
    (kernels / "tables").mkdir(parents=True)
    (kernels / "a.py").write_text("1")
    monkeypatch.setattr(check_device, "ROOT", tmp_path)
    monkeypatch.setattr(check_device, "__file__", str(kernels / "a.py"))
    with_tables, without = check_device.sources(), check_device.sources(tables=False)
    (kernels / "tables" / "x.json").write_text("{}")
    assert check_device.sources(tables=False) == without and check_device.sources() != with_tables


# --- scripts/gpu_check


def run_parts(tmp_path, parts, **replaced):
    """gpu_check --tiny with a suite of one check, and some of its functions replaced; its exit status."""
    only = [check_correct.Check("one", lambda: 0.0)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(check_run.Run, "warm", lambda self: None))
        stack.enter_context(mock.patch.object(check_run, "checks", replaced.pop("checks", lambda *_, **__: iter(only))))
        for name, function in replaced.items():
            module, _, attribute = name.partition("__")
            stack.enter_context(mock.patch(f"{module}.{attribute}", function))
        return check_main.main(["--tiny", "--out", str(tmp_path), "--peers", "marlin", "--parts", f"correct,{parts}"])


def test_after_a_lost_context_no_other_check_is_blamed(gpu, tmp_path, monkeypatch, capsys):
    def illegal():
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    suite = [check_correct.Check(name, illegal) for name in ("the culprit", "innocent")]
    assert run_parts(tmp_path, "host", checks=lambda *_, **__: iter(suite)) == check_main.FAILED
    err = capsys.readouterr().err
    assert "FAILED the culprit" in err and "context is lost after the culprit" in err and "innocent" not in err
    assert "0 of 1 passed" in (tmp_path / "summary.txt").read_text()


def test_what_raises_outside_of_a_case_still_leaves_a_report(gpu, tmp_path):
    def broken(*_):
        raise RuntimeError("nothing works")

    with pytest.raises(RuntimeError, match="nothing works"):
        run_parts(tmp_path, "limits", check_time__chip_limits=broken)
    assert "1 of 1 passed" in (tmp_path / "summary.txt").read_text()


def test_what_the_sanitizer_reports_ends_nothing(gpu, tmp_path):
    """racecheck has called Triton's own reductions hazards: somebody has to read it, with the rest of the figures."""
    host = {"check_machinery__sanitize": lambda tool, *_: (tool == "memcheck", f"{tool}: 3 hazards")}
    model = {"check_model__bench_generate": lambda *_: {"text": "12 tok/s"}}
    assert run_parts(tmp_path, "sanitizer,model", **host, **model) == check_main.FAILED
    summary = (tmp_path / "summary.txt").read_text()
    assert "racecheck: 3 hazards" in summary and "model: w8: 12 tok/s" in summary


def test_a_case_that_was_cut_short_by_the_deadline_is_made_by_resume(gpu, tmp_path):
    """And none is begun that could not end."""

    def endless(shape, weights, seconds):
        raise subprocess.TimeoutExpired("bench_generate", seconds)

    assert run_parts(tmp_path / "a", "model", check_model__bench_generate=endless) == check_main.STOPPED
    assert '"model"' not in (tmp_path / "a" / "records.jsonl").read_text()
    with mock.patch.object(check_run, "MODEL_S", 1e6):
        assert run_parts(tmp_path / "b", "model", check_model__bench_generate=endless) == check_main.STOPPED


def test_a_peer_that_cannot_be_captured_ends_nothing(gpu, tmp_path, capsys):
    """Its reason is in the report, with the versions of those that were measured."""
    peers = {
        "marlin": lambda problem, copies: (
            [lambda x: torch.zeros(x.shape[0], 1, device="cuda").fill_(x.sum().item())] * copies
        )
    }
    with mock.patch.dict(check_peers.PEERS, peers), mock.patch.object(check_measure, "TOKENS", (16,)):
        assert run_parts(tmp_path, "w4a16") == check_main.DONE, capsys.readouterr().err
    summary = (tmp_path / "summary.txt").read_text()
    assert "peer marlin: not measured: RuntimeError" in summary and "(8 of 8 cases)" in summary
    assert "table predicted" in summary


def test_a_family_that_is_what_the_dispatcher_picks_has_a_figure_for_every_linear(gpu, tmp_path, capsys):
    with mock.patch.object(check_measure, "TOKENS", (16,)):
        assert run_parts(tmp_path, "w4a16") == check_main.DONE, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for record in (record for record in records if record["part"] == "w4a16"):
        assert {"lowbit", "lowbit triton", "lowbit gluon", "lowbit dequant", "lowbit scaled"} <= set(record["seconds"])
        assert set(record["tiles"]) == set(record["errors"]) <= set(record["seconds"])
        for name, tile in record["tiles"].items():
            same = tile == record["tiles"]["lowbit"] and name != "lowbit with atomics"
            assert (record["seconds"][name] == record["seconds"]["lowbit"]) >= same


def test_a_report_without_the_dispatchers_choice(tmp_path):
    """--without may leave out what a measured table picks."""
    store = Store(tmp_path, ABOUT, resume=False)
    for linear in ("qkv", "o", "gate_up", "down"):
        store.add("w4a16", linear, measured("w4a16", "8b", 1, linear, {"lowbit triton": 1e-6, "cublas bf16": 2e-6}))
    write_all(store, tmp_path)
    assert "lowbit triton" in (tmp_path / "layers.csv").read_text()


def test_a_case_that_hung_once_and_passed_later_is_not_reported(tmp_path):
    store = Store(tmp_path, ABOUT, resume=False)
    for case in ("a", "b"):
        store.add("hung", case, {"text": "not finished in 150 s"})
    store.add("correct", "a", {"ok": True, "figure": 0.0})
    summary = write_all(store, tmp_path)
    assert "hung: b" in summary and "hung: a" not in summary


def test_nothing_that_the_suite_launches_is_compiled_in_its_turn(gpu):
    """What is left is what a rehearsal does not reach: kernels behind a comparison of what was not computed."""
    jobs = check_warm.rehearsals(90, True, ())
    assert len({job.check for job in jobs}) == len(jobs) > 100
    with mock.patch.object(check_machinery, "compiled_fullgraph", lambda *_: 0.0):
        assert check_warm._compile(jobs) > 100 and not gpu.launches
        ahead = gpu.lowered
        for check in check_correct.checks(torch.device("cuda"), 90, tiny=True):
            check.run()
        late = gpu.lowered - ahead
        assert late <= 0.1 * ahead, f"{late} kernels of {ahead + late} were not compiled ahead"
