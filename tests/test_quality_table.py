"""eval/quality_table.py: what the table holds, what it computes again, and what it refuses."""

import csv
import importlib
import json
import re
import sys
from importlib.metadata import version
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
    names = ("quality_table", "quality_report", "peer_results", "cached_base", "provenance")
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
        assert row["torch"] == version("torch") and row["lowbit"].startswith(lowbit.__version__)
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
