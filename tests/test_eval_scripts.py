"""The scripts behind eval/results/: what the quality table holds and computes again, how the benchmark measures."""

import ast
import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit
from lowbit.data import load_text, token_windows
from lowbit.evaluate import DEFINITION
from lowbit.hf import load_dense

ROOT = Path(__file__).parent.parent
EVAL = ROOT / "eval"
MODEL = EVAL / "data" / "books-4m"
CALIBRATION = EVAL / "data" / "books-calib.txt"
TEXT = EVAL / "data" / "books-test.txt"

SMALL = ["--samples", "8", "--seq-len", "96", "--max-windows", "3", "--specs", "w3g128asym", "--device", "cpu"]


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, found as Python finds them when one is run: beside each other."""
    names = ("quality_table", "quality_report", "peer_results", "cached_base", "provenance", "bench_calibration")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVAL))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def arguments(prefix, *more, methods="rtn,gptq"):
    model = ["--model", str(MODEL), "--calibration", str(CALIBRATION), "--data", str(TEXT)]
    return [*model, *SMALL, "--methods", methods, "--out", str(prefix), *more]


def read(prefix):
    with open(f"{prefix}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(scripts, tmp_path_factory):
    """PREFIX of a table that has been made once."""
    prefix = tmp_path_factory.mktemp("table") / "quality"
    assert scripts.quality_table.main(arguments(prefix)) == 0
    return prefix


@pytest.fixture
def copied(table, tmp_path):
    """The same table, to be changed."""
    for extension in (".csv", ".md"):
        (tmp_path / f"q{extension}").write_bytes(Path(f"{table}{extension}").read_bytes())
    return tmp_path / "q"


@pytest.fixture
def calls(scripts, monkeypatch):
    """Names of lowbit's functions, in the order the table calls them."""
    made = []
    for name in ("quantize_", "evaluate"):
        original = getattr(lowbit, name)

        def wrapper(*args, _name=name, _original=original, **options):
            made.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(lowbit, name, wrapper)
    return made


# --- the quality table


def test_one_row_per_method_with_its_origin(scripts, table):
    rows = read(table)
    assert tuple(rows[0]) == scripts.quality_report.COLUMNS
    assert [row["method"] for row in rows] == ["rtn", "gptq"]
    text = load_text(TEXT, "test")
    for row in rows:
        assert (row["model"], row["spec"], row["data"]) == ("books-4m", "w3g128asym", "data/books-test.txt")
        assert (row["windows"], row["seq_len"], row["dtype"]) == ("3", "96", "float32")
        assert row["data_sha256"] == text.sha256
        assert row["torch"] == torch.__version__ and row["lowbit"].startswith(lowbit.__version__)
        assert row["hardware"] and int(row["threads"]) == torch.get_num_threads()
        assert float(row["seconds"]) > 0
    assert rows[0]["calibration"] == "" and rows[0]["samples"] == "0", "rtn is without data"
    assert rows[1]["calibration_sha256"] == load_text(CALIBRATION, "train").sha256
    assert rows[1]["samples"] == "8"


def test_the_figures_are_those_of_the_public_functions(table):
    model, tokenizer = load_dense(MODEL, dtype="float32")
    base, _ = load_dense(MODEL, dtype="float32")
    tokens = token_windows(tokenizer, load_text(CALIBRATION, "train").text, 96, 8)
    report = lowbit.quantize_(model, lowbit.QuantSpec(3, 128, False), "gptq", calibration=tokens, packed=False)
    result = lowbit.evaluate(model, tokenizer, TEXT, base=base, seq_len=96, max_windows=3, progress=False)
    row = read(table)[1]
    assert float(row["ppl"]) == pytest.approx(result.ppl, rel=1e-6)
    assert float(row["base_ppl"]) == pytest.approx(result.base_ppl, rel=1e-6)
    assert float(row["kl"]) == pytest.approx(result.kl, rel=1e-4)
    assert float(row["top1"]) == pytest.approx(result.top1, abs=1e-6)
    assert float(row["bits"]) == pytest.approx(report.linear_bits, abs=1e-4)
    assert result.kl > 0.01, "three bits must show, or this compares nothing"


def test_the_markdown_states_protocol_origin_and_figures(table):
    text = Path(f"{table}.md").read_text(encoding="utf-8")
    for row in read(table):
        assert re.search(rf"\| {row['spec']} \| {row['method']} \|.*\| {float(row['kl']):.5f} \|", text)
        assert row["hardware"] in text and row["command"] in text and row["lowbit_sources"] in text
    assert DEFINITION in text
    assert "First 3 windows of 96 tokens, float32" in text
    assert "llm-compressor" not in text, "without a peers file there is no column for it"


def test_rows_that_are_there_are_not_computed_again(scripts, copied, calls):
    before = Path(f"{copied}.csv").read_bytes()
    assert scripts.quality_table.main(arguments(copied)) == 0
    assert calls == []
    assert Path(f"{copied}.csv").read_bytes() == before


def test_only_what_is_missing_is_computed(scripts, copied, calls):
    """A second text, and a weighted rtn: the gptq rows of the first text stay."""
    more = ["--data", str(CALIBRATION)]
    assert scripts.quality_table.main(arguments(copied, *more, methods="rtn,rtn (weighted)")) == 0
    assert calls == ["quantize_", "evaluate", "quantize_", "evaluate", "evaluate"]
    found = [(row["data"], row["method"]) for row in read(copied)]
    assert found == [
        ("data/books-calib.txt", "rtn"),
        ("data/books-calib.txt", "rtn (weighted)"),
        ("data/books-test.txt", "rtn"),
        ("data/books-test.txt", "rtn (weighted)"),
        ("data/books-test.txt", "gptq"),
    ]
    plain, weighted = read(copied)[2:4]
    assert plain["kl"] != weighted["kl"] and weighted["samples"] == "8"


@pytest.mark.parametrize("reason", ["--force", "other sources", "other windows"])
def test_rows_are_computed_again_when_they_must(scripts, copied, calls, monkeypatch, reason):
    more = {"--force": ["--force"], "other windows": ["--max-windows", "2"]}.get(reason, [])
    if reason == "other sources":
        monkeypatch.setattr(scripts.quality_table, "lowbit_sources", lambda: "0" * 12)
    assert scripts.quality_table.main(arguments(copied, *more, methods="rtn")) == 0
    assert calls == ["quantize_", "evaluate"]
    rows = read(copied)
    assert len(rows) == (3 if reason == "other windows" else 2), "a row made anew replaces the old one"


def test_an_interrupted_table_keeps_the_finished_rows(scripts, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(scripts.quality_report.Table, "put", interrupting(scripts.quality_report.Table.put, after=1))
    with pytest.raises(KeyboardInterrupt):
        scripts.quality_table.main(arguments(tmp_path / "q", methods="rtn,rtn (weighted)"))
    assert [row["method"] for row in read(tmp_path / "q")] == ["rtn"]
    monkeypatch.undo()
    assert scripts.quality_table.main(arguments(tmp_path / "q", methods="rtn,rtn (weighted)")) == 0
    assert [row["method"] for row in read(tmp_path / "q")] == ["rtn", "rtn (weighted)"]


def interrupting(put, after):
    """``Table.put``, but Ctrl-C comes when it is called once more than ``after`` times."""
    left = iter(range(after))

    def wrapper(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return put(*args)

    return wrapper


# --- other tools beside ours


def peers_file(path, row, **changes):
    """Another tool's figures on what ``row`` was measured on."""
    data, base = row["data"], {"ppl": float(row["base_ppl"]), "windows": int(row["windows"])}
    content = {
        "about": {"model": row["model"], "versions": "llmcompressor 7.8.9"},
        "base": {data: {**base, **changes}},
        "llmcompressor-gptq-w3g128asym": {data: {"ppl": 50.5, "kl": 0.25, "top1": 0.5}, "seconds": 9.9},
        "autoround-w3g128asym": {data: {"ppl": 44.25, "kl": 0.125, "top1": 0.75}},
        "autoround-w2g64asym": {data: {"ppl": 99.0, "kl": 9.0, "top1": 0.1}},
        "llmcompressor-awq-w3g128asym": {"error": "it failed"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_a_peers_figures_stand_beside_the_method_of_the_same_name(scripts, copied, tmp_path, calls):
    peers = peers_file(tmp_path / "peers.json", read(copied)[1])
    assert scripts.quality_table.main(arguments(copied, "--peers", peers)) == 0
    assert calls == [], "figures are put beside rows that are there"
    rtn, gptq = read(copied)
    assert (rtn["peer_kl"], rtn["kl_ratio"]) == ("", "")
    assert (gptq["peer_ppl"], gptq["peer_kl"]) == ("50.5", "0.25")
    assert float(gptq["kl_ratio"]) == pytest.approx(float(gptq["kl"]) / 0.25, abs=1e-4)
    text = Path(f"{copied}.md").read_text(encoding="utf-8")
    assert f"| 50.500 | 0.25000 | {float(gptq['kl_ratio']):.3f} |" in text
    assert "| w3g128asym | *autoround* |  | 44.250 | 0.12500 | 75.00 % |" in text
    assert "llmcompressor 7.8.9" in text and "99.000" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"windows": 4}, "on 4 windows of data/books-test.txt, not 3"), ({"ppl": 40.0}, "perplexity on .* is 40.000")],
    ids=["other windows", "other text"],
)
def test_figures_on_something_else_are_not_put_beside(scripts, copied, tmp_path, capsys, changes, message):
    peers = peers_file(tmp_path / "peers.json", read(copied)[1], **changes)
    assert scripts.quality_table.main(arguments(copied, "--peers", peers)) == 0
    assert re.search(message, capsys.readouterr().err)
    assert all(row["peer_kl"] == "" for row in read(copied))


# --- what the table refuses


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--specs", "w4g128"], "a spec looks like w4g128asym, w8gchsym, w8a8dyn or w8a8static, got 'w4g128'"),
        (["--specs", "w9g128sym"], "bits must be one of"),
        (["--methods", "rtn,gtpq"], "--methods are of rtn, .*got gtpq"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--samples", "100000"], "holds [0-9]+ windows of 96 tokens, --samples is 100000"),
        (["--model", str(MODEL)], "told apart by their folders' names"),
        (["--data", "missing.txt"], "'missing.txt' does not exist"),
        (["--peers", "missing.json"], "'missing.json' does not exist"),
        (["--peers", str(MODEL / "config.json")], "has not the form that eval/peer_results.py describes"),
    ],
)
def test_bad_input_ends_with_one_message_and_writes_nothing(scripts, tmp_path, capsys, more, message):
    assert scripts.quality_table.main(arguments(tmp_path / "q", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("quality_table: error: ") and re.search(message, error)
    assert list(tmp_path.iterdir()) == []


def test_calibrating_methods_need_a_text(scripts, tmp_path, capsys):
    options = ["--model", str(MODEL), "--data", str(TEXT), "--out", str(tmp_path / "q")]
    assert scripts.quality_table.main(options) == 2
    assert "--calibration is missing" in capsys.readouterr().err


def test_a_csv_of_other_columns_is_left_alone(scripts, tmp_path, capsys):
    (tmp_path / "q.csv").write_text("a,b\n1,2\n")
    assert scripts.quality_table.main(arguments(tmp_path / "q")) == 2
    assert "is not a table of this version" in capsys.readouterr().err
    assert (tmp_path / "q.csv").read_text() == "a,b\n1,2\n"


def test_specs_are_read_as_they_are_written(scripts):
    for spec in (lowbit.QuantSpec(3, 64, True), lowbit.QuantSpec(8, -1, False)):
        assert scripts.quality_table.parse_spec(spec.label()) == spec


# --- its parts


@pytest.mark.parametrize(("limit", "runs"), [(10**9, 3), (0, 6), (96 * 4096 * 4, 5)])
def test_the_base_runs_once_per_window_that_fits_the_memory(scripts, limit, runs):
    model, tokenizer = load_dense(MODEL, dtype="float32")
    counted = CountingModel(model)
    base = scripts.cached_base.CachedBase(counted, limit)
    options = {"seq_len": 96, "max_windows": 3, "progress": False}
    first, again = (lowbit.evaluate(model, tokenizer, TEXT, base=base, **options) for _ in range(2))
    assert counted.runs == runs
    assert first == again == lowbit.evaluate(model, tokenizer, TEXT, base=model, **options)


class CountingModel:
    """A model that counts how often it is run."""

    def __init__(self, model):
        self.model, self.runs = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, **options):
        self.runs += 1
        return self.model(**options)


def test_a_command_line_holds_no_path_of_this_machine(scripts, monkeypatch, tmp_path):
    words = [str(EVAL / "quality_table.py"), "--model", str(MODEL), f"--out={tmp_path / 'q'}", "--specs", "w4g128sym"]
    monkeypatch.setattr(sys, "argv", words)
    command = scripts.provenance.command_line()
    assert command.startswith("python eval/quality_table.py --model eval/data/books-4m --out=..")
    assert command.endswith(" --specs w4g128sym")
    assert str(ROOT) not in command and " /" not in command


def test_changed_sources_have_another_hash(scripts, monkeypatch, tmp_path):
    package = tmp_path / "lowbit"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(lowbit, "__file__", str(package / "__init__.py"))
    first = scripts.provenance.lowbit_sources()
    (package / "more.py").write_text("")
    second = scripts.provenance.lowbit_sources()
    (package / "__init__.py").write_text("a = 2\n")
    assert len({first, second, scripts.provenance.lowbit_sources()}) == 3


# --- the calibration benchmark

RESULT = {
    "seconds": {"quantize": 2.0, "write": 0.5},
    "calibration": {"sha256": "x", "windows": 1, "seq_len": 2, "tokens": 2},
}


def child(code, result=RESULT):
    """A program that runs ``code``, saves four bytes into its first argument, a folder, and prints ``result``."""
    saving = (
        "import pathlib, sys; out = pathlib.Path(sys.argv[1]); out.mkdir(); (out / 'm.safetensors').write_text('1234')"
    )
    return f"{code}\n{saving}\nprint('a library speaks')\nprint({json.dumps(json.dumps(result))})"


def python_arm(scripts, name, code="", result=RESULT):
    command = (sys.executable, "-c", child(code, result), "OUT")
    return scripts.bench_calibration.Arm(name, command, dict(os.environ))


def bench_arguments(*more):
    model = ["--model", str(MODEL), "--calibration", str(CALIBRATION), "--peer-python", sys.executable]
    return [*model, "--samples", "2", "--seq-len", "64", "--threads", "1", *more]


def test_the_lowbit_arm_is_measured(scripts):
    """The real command."""
    bench = scripts.bench_calibration
    run = bench.run_arm(bench.lowbit_arm(bench._parser().parse_args(bench_arguments("--asymmetric"))))
    assert 0 < run.calibrate_and_pack < run.whole
    assert run.calibration == {
        "sha256": load_text(CALIBRATION, "train").sha256, "windows": 2, "seq_len": 64, "tokens": 128,
    }  # fmt: skip
    # float32: embeddings of 4096 x 256, and 4 to 4.5 bits for each of the 3.1 M weights of the blocks.
    embeddings = 4096 * 256 * 4
    assert embeddings + 3.1e6 * 4 / 8 < run.saved_bytes < embeddings + 3.2e6 * 4.5 / 8
    assert run.peak_bytes > 100e6, "torch alone takes more"


def test_each_run_has_its_own_peak():
    """From a process as small as the script's own: what a child counts before exec() is its parent's memory.

    RUSAGE_CHILDREN would give the second process the first one's peak, and so would a parent that has torch loaded.
    """
    code = (
        "import json, os, sys; sys.path.insert(0, sys.argv[1]); import bench_calibration as bench\n"
        "bench.lowbit_version()\n"
        "arms = [bench.Arm(name, (sys.executable, '-c', sys.argv[2], 'OUT', size), os.environ)\n"
        "        for name, size in (('large', '300'), ('small', '0'))]\n"
        "print(json.dumps([run.peak_bytes for run in bench.alternate(arms, 2)]))"
    )
    allocating = child("import sys; x = bytearray(int(sys.argv[2]) * 10**6)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(EVAL), allocating]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert min(peaks[::2]) > 300e6 and max(peaks[1::2]) < 100e6


def test_the_benchmark_stays_a_small_process():
    """Its own memory is the least that a child's peak can read."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import bench_calibration as b; b.lowbit_version(); "
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(EVAL)], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_failed_run_is_reported_with_what_it_said(scripts):
    arm = python_arm(scripts, "peer", "raise SystemExit('no such recipe')")
    with pytest.raises(ValueError, match=r"peer failed with 1: no such recipe"):
        scripts.bench_calibration.run_arm(arm)


@pytest.mark.parametrize("stdout", ["", "done", "[1]", '{"seconds": {"quantize": 1}, "calibration": {}}', "{}"])
def test_a_run_without_its_times_is_an_error(scripts, stdout):
    with pytest.raises(ValueError, match="peer did not end with a JSON object of seconds and calibration"):
        scripts.bench_calibration.parse_result(stdout, "peer")


def test_a_run_that_saves_nothing_is_an_error(scripts):
    arm = scripts.bench_calibration.Arm("peer", (sys.executable, "-c", f"print({json.dumps(json.dumps(RESULT))})"), {})
    with pytest.raises(ValueError, match="peer wrote no safetensors file"):
        scripts.bench_calibration.run_arm(arm)


def test_the_two_arms_run_in_turn(scripts):
    runs = scripts.bench_calibration.alternate([python_arm(scripts, "a"), python_arm(scripts, "b")], 2)
    assert [run.arm for run in runs] == ["a", "b", "a", "b"]
    assert all(run.calibrate_and_pack == 2.5 and run.saved_bytes == 4 and run.whole > 0 for run in runs)


def test_arms_that_calibrate_on_other_tokens_are_not_compared(scripts):
    other = {**RESULT, "calibration": {**RESULT["calibration"], "sha256": "y"}}
    arms = [python_arm(scripts, "a"), python_arm(scripts, "b", result=other)]
    with pytest.raises(ValueError, match="not the same calibration"):
        scripts.bench_calibration.alternate(arms, 1)


def test_ratios_are_of_medians_and_of_pairs(scripts):
    bench = scripts.bench_calibration
    times = {"lowbit": (1.0, 2.0, 30.0), "peer": (4.0, 5.0, 6.0)}
    runs = [
        bench.Run(arm, times[arm][i], times[arm][i] / 2, 10**6, 10**6, RESULT["calibration"], {})
        for i in range(3)
        for arm in times
    ]
    summary = bench.summarize(runs)
    assert summary["whole"] == {"median": {"lowbit": 2.0, "peer": 5.0}, "ratio": 0.4, "pair_ratios": [0.25, 5.0]}
    assert summary["peak_bytes"]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--model", str(EVAL)], "is not a model folder: it has no config.json"),
        (["--calibration", "wikitext2"], "must be an existing .txt or .jsonl file, got 'wikitext2'"),
        (["--peer-python", "/nowhere/python"], "'/nowhere/python' is no interpreter"),
        ([], "has no llmcompressor"),
    ],
)
def test_the_benchmark_refuses_before_the_first_run(scripts, tmp_path, capsys, more, message):
    if not more and importlib.util.find_spec("llmcompressor"):
        pytest.fail("llmcompressor is no dependency of lowbit and must not be in its environment")
    assert scripts.bench_calibration.main(bench_arguments("--out", str(tmp_path / "b"), *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_calibration: error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_written_with_settings_and_every_run(scripts, tmp_path, monkeypatch, capsys):
    bench = scripts.bench_calibration
    monkeypatch.setattr(bench, "_check", lambda options: None)
    monkeypatch.setattr(bench, "lowbit_arm", lambda options: python_arm(scripts, "lowbit"))
    theirs = {**RESULT, "seconds": {"quantize": 4.0, "write": 1.0}, "versions": {"llmcompressor": "7.8.9"}}
    monkeypatch.setattr(bench, "peer_arm", lambda options: python_arm(scripts, "llm-compressor", result=theirs))
    assert bench.main(bench_arguments("--out", str(tmp_path / "b"), "--repeat", "2")) == 0
    text = (tmp_path / "b.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| calibrate and pack, s | 2.50 | 5.00 | 0.500 (0.500 to 0.500) |" in text
    assert "w4g128sym in float32" in text and "llmcompressor 7.8.9" in text and "1 threads" in text
    record = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert len(record["runs"]) == 4 and record["setting"]["samples"] == 2


def test_the_peers_script_knows_the_options_it_is_given(scripts):
    """It cannot be imported here, its dependencies live in another environment."""
    bench = scripts.bench_calibration
    given = {
        word
        for symmetry in ("--symmetric", "--asymmetric")
        for word in bench.peer_arm(bench._parser().parse_args(bench_arguments(symmetry))).command
        if word.startswith("--")
    }
    calls = (node for node in ast.walk(ast.parse(bench.PEER_SCRIPT.read_text(encoding="utf-8"))) if is_option(node))
    known = {argument.value for node in calls for argument in node.args if isinstance(argument, ast.Constant)}
    assert len(given) > 8 and given <= known


def is_option(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"


@pytest.mark.parametrize(
    ("label", "spec", "smooth"),
    [
        ("w8a8dyn", "w8a8gchsym", None),
        ("w8a8static", "w8a8staticgchsym", None),
        ("w8a8static+smooth0.5", "w8a8staticgchsym", 0.5),
    ],
)
def test_activations_and_smoothing_have_labels_of_their_own(scripts, label, spec, smooth):
    found, alpha = scripts.quality_table.parse_request(label)
    assert (found.label(), alpha) == (spec, smooth)
    assert scripts.quality_table.parse_spec(found.label()) == found


def test_a_smoothing_that_is_no_number_is_refused(scripts):
    with pytest.raises(ValueError, match=r"w8a8dyn\+smoothly"):
        scripts.quality_table.parse_request("w8a8dyn+smoothly")
