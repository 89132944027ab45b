"""The main job on a real trained model: quantize a folder, load it packed, measure what was lost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lowbit
from lowbit import QuantLinear, QuantSpec, hf
from lowbit.data import load_text, token_windows
from lowbit.windows import first_windows
from packed_folder import dequantized_by_compressed_tensors
from tiny_models import BOOKS_4M, tiny_folder

DATA = BOOKS_4M.parent
CALIB, TEST = DATA / "books-calib.txt", DATA / "books-test.txt"
ROOT = DATA.parent.parent
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
CALIBRATED = {"calibration": CALIB, "samples": 8, "seq_len": 256, "device": "cpu", "verbose": False}
LINEARS, WEIGHTS = 4 * 7, 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768)
WINDOWS = {"data": TEST, "seq_len": 256, "max_windows": 6, "progress": False}

CASES = {
    "gptq-w4sym": {"bits": 4, "symmetric": True, "method": "gptq", **CALIBRATED},
    "gptq-w4asym": {"bits": 4, "symmetric": False, "method": "gptq", **CALIBRATED},
    "rtn-w4sym": {"bits": 4, "symmetric": True, "method": "rtn", **CALIBRATED},
    "rtn-w2asym": {"bits": 2, "symmetric": False, "group_size": 64, "method": "rtn", "verbose": False},
    "rtn-w8sym": {"bits": 8, "symmetric": True, "group_size": -1, "method": "rtn", "verbose": False},
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def source_before():
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(BOOKS_4M.iterdir())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, source_before):
    """Folder and report of every case."""
    root = tmp_path_factory.mktemp("books")
    return {name: (root / name, lowbit.quantize(BOOKS_4M, root / name, **options)) for name, options in CASES.items()}


@pytest.fixture(scope="module")
def base():
    return hf.load_dense(BOOKS_4M, dtype="float32")


@pytest.fixture(scope="module")
def measured(runs, base):
    """Evaluation of every case against the original, in float32."""
    results = {}
    for name, (folder, _) in runs.items():
        model, tokenizer = lowbit.load(folder, device="cpu", dtype="float32")
        results[name] = lowbit.evaluate(model, tokenizer, base=base[0], **WINDOWS)
    return results


def manifest(folder):
    return json.loads((folder / "lowbit.json").read_text())


# --- quality


def test_gptq_loses_less_than_round_to_nearest(measured):
    assert 0 < measured["gptq-w4sym"].kl < 0.7 * measured["rtn-w4sym"].kl
    assert measured["gptq-w4sym"].top1 > measured["rtn-w4sym"].top1
    assert measured["gptq-w4asym"].kl < measured["gptq-w4sym"].kl


def test_more_bits_lose_less(measured):
    assert measured["rtn-w8sym"].kl < 0.01 * measured["rtn-w4sym"].kl
    assert measured["rtn-w4sym"].kl < 0.2 * measured["rtn-w2asym"].kl


@cases
def test_every_case_is_measured_against_the_same_base(measured, case):
    result = measured[case]
    assert result.base_ppl == measured["gptq-w4sym"].base_ppl
    assert (result.windows, result.seq_len, result.tokens) == (6, 256, 6 * 255)
    assert result.dtype == "float32" and 0 < result.top1 <= 1


# --- the report is what lies in the folder


@cases
def test_the_report_is_the_folders_record(runs, case):
    folder, report = runs[case]
    record = manifest(folder)
    assert record.pop("lowbit_version") == lowbit.__version__
    assert record.pop("files").keys() == {path.name for path in folder.iterdir()} - {"lowbit.json"}
    expected = json.loads(json.dumps(report.to_dict()))
    # Wall time goes on after the record was written.
    assert record.pop("seconds").keys() == expected.pop("seconds").keys() == {"load", "quantize", "write"}
    assert record == expected


@cases
def test_every_decoder_weight_is_covered_and_every_other_one_named(runs, case):
    _, report = runs[case]
    assert report.coverage == 1.0 and len(report.layers) == LINEARS
    assert sum(layer.shape[0] * layer.shape[1] for layer in report.layers) == WEIGHTS
    assert [weight.name for weight in report.skipped] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert report.skipped[1].reason == "the same weight as model.embed_tokens.weight"


def test_the_calibration_is_recorded(runs):
    assert runs["gptq-w4sym"][1].calibration == {
        "source": str(CALIB),
        "sha256": hashlib.sha256(CALIB.read_bytes()).hexdigest(),
        "windows": 8,
        "seq_len": 256,
        "tokens": 2048,
    }
    assert runs["rtn-w8sym"][1].calibration is None, "rtn was given no text"
    assert {layer.loss_of for layer in runs["rtn-w4sym"][1].layers} == {"outputs"}
    assert {layer.loss_of for layer in runs["rtn-w8sym"][1].layers} == {"weights"}


def test_no_layer_is_above_round_to_nearest(runs):
    for name in ("gptq-w4sym", "gptq-w4asym"):
        assert all(layer.loss <= layer.rtn_loss for layer in runs[name][1].layers)
        assert sum(layer.loss for layer in runs[name][1].layers) < 0.7 * sum(x.rtn_loss for x in runs[name][1].layers)


# --- sizes


@cases
def test_bits_per_weight_counted_from_the_file(runs, case):
    """From the shard's own table of tensors: codes, scales, zeros and shapes, against the weights they stand for."""
    folder, report = runs[case]
    bits = counted = weights = 0
    with safe_open(folder / "model.safetensors", framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118  (a safe_open handle is not iterable)
            tensor = shard.get_tensor(name)
            if ".weight_" not in name:
                continue
            bits += 8 * tensor.nbytes
            if name.endswith("weight_shape"):
                weights += int(tensor.prod())
            else:
                counted += 8 * tensor.nbytes
    assert weights == WEIGHTS
    assert report.linear_bits == pytest.approx(counted / weights, rel=1e-12)
    if case == "gptq-w4sym":
        assert bits / weights <= 4.25
        assert report.linear_bits == 4 + 16 / 128, "a bfloat16 scale per 128 weights"


@cases
def test_the_loaded_model_takes_the_memory_of_its_file(runs, case):
    folder, report = runs[case]
    model, _ = lowbit.load(folder, device="cpu")
    held = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    assert held == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.05)
    assert report.packed_bytes == pytest.approx(held, rel=0.01)
    assert report.base_bytes == pytest.approx((BOOKS_4M / "model.safetensors").stat().st_size, rel=0.01)


# --- what is loaded is what was calibrated


@cases
@pytest.mark.parametrize("tokens", [1, 96])
def test_packed_logits_agree_with_compressed_tensors(runs, case, tokens):
    folder, _ = runs[case]
    model, tokenizer = lowbit.load(folder, device="cpu", dtype="float32")
    ids = token_windows(tokenizer, TEST.read_text()[:4000], max(2, tokens))[:1, :tokens]
    with torch.no_grad():
        ours, theirs = model(ids).logits, dequantized_by_compressed_tensors(folder)(ids).logits
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_the_folder_holds_what_quantize_in_place_finds(runs):
    """The same tokens, the same bits: there is one pipeline."""
    model, tokenizer = hf.load_dense(BOOKS_4M)
    tokens = token_windows(tokenizer, load_text(CALIB, "train").text, 256, 8)
    report = lowbit.quantize_(model, QuantSpec(4, 128, True), "gptq", calibration=tokens)
    stored = load_file(runs["gptq-w4sym"][0] / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    assert [vars(layer) for layer in report.layers] == [vars(layer) for layer in runs["gptq-w4sym"][1].layers]


def test_loaded_layers_stay_packed_and_generate(runs):
    model, tokenizer = lowbit.load(runs["gptq-w4sym"][0], device="cpu")
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len(packed) == LINEARS
    prompt = tokenizer("It is a truth universally", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("It is a truth universally") and len(text) > 30


def test_what_is_not_packed_is_the_sources(runs):
    source = load_file(BOOKS_4M / "model.safetensors")
    stored = load_file(runs["gptq-w4sym"][0] / "model.safetensors")
    dense = {name for name in stored if ".weight_" not in name}
    assert dense == {name for name in source if "proj" not in name}
    assert all(torch.equal(stored[name], source[name]) for name in dense)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (runs["gptq-w4sym"][0] / name).read_bytes() == (BOOKS_4M / name).read_bytes()


def test_the_input_is_unchanged(runs, source_before):
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(BOOKS_4M.iterdir())}
    assert after == source_before


def test_a_second_run_writes_the_same_bytes(runs, tmp_path):
    lowbit.quantize(BOOKS_4M, tmp_path / "again", **CASES["rtn-w2asym"])
    shards = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", runs["rtn-w2asym"][0])]
    assert shards[0] == shards[1]


# --- options


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


TINY = {"group_size": 32, "calibration": CALIB, "seq_len": 32, "device": "cpu", "verbose": False}


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_folded_scales_reach_the_file(tiny, tmp_path, method):
    """AWQ changes norms; with 8 bits nothing but a fold that was lost could move the logits."""
    lowbit.quantize(tiny, tmp_path / "out", 8, method=method, samples=4, **TINY)
    stored, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(tiny / "model.safetensors")
    assert not torch.equal(
        stored["model.layers.0.input_layernorm.weight"], source["model.layers.0.input_layernorm.weight"]
    )
    (model, tokenizer), (base, _) = lowbit.load(tmp_path / "out", device="cpu"), hf.load_dense(tiny)
    ids = token_windows(tokenizer, TEST.read_text()[:2000], 64)[:2]
    with torch.no_grad():
        ours, theirs = model(ids).logits, base(ids).logits
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_overwriting_replaces_the_result(tiny, tmp_path):
    lowbit.quantize(tiny, tmp_path / "out", 4, samples=4, **TINY)
    with pytest.raises(FileExistsError, match="exists"):
        lowbit.quantize(tiny, tmp_path / "out", 8, samples=4, **TINY)
    lowbit.quantize(tiny, tmp_path / "out", 8, samples=4, overwrite=True, **TINY)
    assert manifest(tmp_path / "out")["spec"]["bits"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model, _ = lowbit.load(tmp_path / "out", device="cpu")
    assert {m.spec.bits for m in model.modules() if isinstance(m, QuantLinear)} == {8}


def test_what_is_ignored_is_dense_in_file_and_loaded_model(tiny, tmp_path):
    report = lowbit.quantize(tiny, tmp_path / "out", samples=4, ignore=["layers.0.self_attn.o_proj"], **TINY)
    assert 0.9 < report.coverage < 1
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"],
        load_file(tiny / "model.safetensors")[f"{name}.weight"],
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["quantization_config"]["ignore"]) == ["lm_head", name]
    model, _ = lowbit.load(tmp_path / "out", device="cpu")
    assert type(model.get_submodule(name)) is torch.nn.Linear


def test_the_dtype_of_scales_and_dense_weights_can_be_chosen(tiny, tmp_path):
    lowbit.quantize(tiny, tmp_path / "out", samples=4, dtype="bfloat16", **TINY)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if t.is_floating_point()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_a_number_of_samples_a_short_text_is_enough(tiny, tmp_path):
    (tmp_path / "short.txt").write_text(CALIB.read_text()[:2000])
    options = {**TINY, "calibration": tmp_path / "short.txt"}
    report = lowbit.quantize(tiny, tmp_path / "out", **options)
    assert 3 < report.calibration["windows"] < 30


def test_windows_are_cut_to_the_models_context(tiny, tmp_path):
    report = lowbit.quantize(tiny, tmp_path / "out", samples=2, **{**TINY, "seq_len": 2048})
    assert report.calibration["seq_len"] == 128


def test_a_part_of_a_text_gives_the_same_first_windows_as_the_whole(base):
    tokenizer, text = base[1], CALIB.read_text()
    whole = token_windows(tokenizer, text, 64)
    for wanted in (1, 7, 40):
        assert torch.equal(first_windows(tokenizer, text, 64, wanted), whole[:wanted])


def test_a_part_of_a_text_without_one_window_is_no_reason_to_refuse_it():
    class OneTokenPerLine:
        def __call__(self, text, verbose):
            return SimpleNamespace(input_ids=list(range(text.count("\n"))))

    text = ("x" * 999 + "\n") * 200  # the part tried first, of 8 characters per token, holds 1 token
    assert torch.equal(first_windows(OneTokenPerLine(), text, 64, 2), torch.arange(128).reshape(2, 64))


# --- the command line, as the README shows it


def test_the_three_commands(tiny, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "lowbit", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    out = tmp_path / "w4"
    options = ["--calibration", CALIB, "--samples", 4, "--seq-len", 32, "--group-size", 32, "--device", "cpu"]
    report = run("quantize", tiny, out, *options)
    assert (report["coverage"], report["out"], len(report["layers"])) == (1.0, str(out), 14)
    result = run("eval", out, "--data", TEST, "--base", tiny, "--seq-len", 64, "--max-windows", 2, "--device", "cpu")
    assert {"ppl", "tokens", "windows", "seq_len", "base_ppl", "kl", "top1"} <= result.keys()
    assert 0 < result["kl"] < 0.1
    assert run("inspect", out)
    assert Path(out / "lowbit.json").is_file()
