"""Whatever is wrong ends as one message and exit status 2 (130 for Ctrl-C); nothing is left at OUT, nothing is changed.

Every case runs twice: towards a new folder, and with ``--overwrite`` towards a folder that must survive.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.cli import main
from tiny_models import BOOKS_4M, tiny_folder

ROOT = Path(__file__).parent.parent
TEXT = str(ROOT / "eval" / "data" / "books-calib.txt")
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
CALIBRATED = ["--calibration", TEXT, "--samples", "4", "--seq-len", "32", "--group-size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture(scope="module")
def packed(pristine, tmp_path_factory):
    """A packed folder of ours."""
    out = tmp_path_factory.mktemp("packed") / "model"
    lowbit.quantize(pristine, out, group_size=32, method="rtn", verbose=False)
    return out


@pytest.fixture
def model(pristine, tmp_path):
    """A copy a test may damage; OUT is to appear beside it."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(params=["new", "existing"])
def out(request, tmp_path):
    """Where the result is to go: nothing is there yet, or a model that may be overwritten."""
    path = tmp_path / "results" / "out"
    path.parent.mkdir()
    if request.param == "existing":
        path.mkdir()
        (path / "config.json").write_text('{"an": "older result"}')
    return path


def tree(folder):
    """Everything below a folder, with the content's hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def arguments(model, out, *options):
    return ["quantize", str(model), str(out), *options, *(["--overwrite"] if out.exists() else [])]


def one_message(out, err):
    """The message, the only one, on stderr."""
    assert out == "", "nothing on stdout"
    assert "Traceback" not in err and "Warning" not in err
    assert err.count("lowbit: error: ") == 1
    return err.partition("lowbit: error: ")[2].rstrip("\n")


@pytest.fixture
def refused(capfd, tmp_path):
    """Runs a command that must fail before it changes anything; returns its message."""

    def run(command, *, before_work=True):
        before = tree(tmp_path)
        status = main(command)
        captured = capfd.readouterr()
        assert status == 2
        if before_work:
            assert captured.err.startswith("lowbit: error: "), "no plan, no progress"
        message = one_message(captured.out, captured.err)
        assert tree(tmp_path) == before, "neither a folder at OUT or beside it, nor a changed input"
        return message

    return run


# --- what is asked for


@pytest.mark.parametrize("bits", ["0", "1", "7", "16", "-4"])
def test_unknown_bits(refused, model, out, bits):
    message = refused(arguments(model, out, "--bits", bits))
    assert message == f"bits must be one of (2, 3, 4, 5, 6, 8), got {bits}"


@pytest.mark.parametrize("bits", ["3", "5", "6"])
def test_bits_without_a_file_format(refused, model, out, bits):
    message = refused(arguments(model, out, "--bits", bits, *CALIBRATED))
    assert message.startswith(f"{bits}-bit weights have no packed form (packed widths: (2, 4, 8))")


def test_an_unknown_group_size(refused, model, out):
    message = refused(arguments(model, out, "--group-size", "48"))
    assert message == "group_size must be one of (32, 64, 128, -1) (-1 is the whole row), got 48"


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_group_size_that_does_not_divide(refused, model, out, method):
    options = ["--method", method, "--calibration", TEXT, "--samples", "2", "--seq-len", "32"]
    message = refused(arguments(model, out, *options, "--group-size", "128"))
    assert "model.layers.0.self_attn.q_proj: group_size 128 does not divide K = 64" in message
    assert "group sizes that would work: [32, 64, -1]" in message


def test_sizes_that_fit_some_layers_only(refused, tmp_path, out):
    model = tiny_folder(tmp_path / "narrow", hidden=96)
    message = refused(arguments(model, out, "--method", "rtn", "--group-size", "64"))
    assert "K = 96; group sizes that would work: [32, -1]" in message
    assert "down_proj" not in message, "K = 128 is fine there"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--seq-len", "1"], "seq_len must be at least 2 tokens, got 1"),
        (["--ignore", "(q_proj"], "ignore '(q_proj' is not a regular expression: missing )"),
        (["--ignore", "nothing_of_the_kind"], "ignore 'nothing_of_the_kind' matches no weight of the model"),
        (["--ignore", "mlp"], "only 40.0% of the decoder's weights would be quantized, at least 90% is expected"),
        (["--dtype", "float8"], "dtype must be auto, float32, float16, bfloat16, got 'float8'"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_options_out_of_range(refused, model, out, options, complaint):
    assert refused(arguments(model, out, *CALIBRATED, *options)).startswith(complaint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(refused, model, out, device):
    message = refused(arguments(model, out, *CALIBRATED, "--device", device))
    assert message == f"device '{device}' was asked for, but torch sees 0 CUDA devices"


# --- the calibration text


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_an_empty_calibration_text(refused, model, out, tmp_path, content):
    text = tmp_path / "empty.txt"
    text.write_text(content)
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(text)))
    assert message == f"text source {str(text)!r} is empty"


def test_a_calibration_text_shorter_than_one_window(refused, model, out, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("It was the best of times.")
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(text)))
    assert "tokens, which is shorter than one window of 32 tokens" in message


def test_a_calibration_text_of_fewer_windows_than_samples(refused, model, out, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 10)
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(text), "--samples", "50"))
    assert "windows of 32 tokens, 50 were asked for; use a longer text, fewer samples or a shorter seq_len" in message
    assert str(text) in message


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_calibration_text(refused, model, out, tmp_path, name):
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(tmp_path / name)))
    assert message == f"text file {str(tmp_path / name)!r} does not exist"


def test_a_calibration_text_that_is_not_utf8(refused, model, out, tmp_path):
    (tmp_path / "latin.txt").write_bytes("das Gewölbe".encode("latin-1"))
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(tmp_path / "latin.txt")))
    assert "is not UTF-8: byte 7" in message


def test_a_jsonl_line_without_text(refused, model, out, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    message = refused(arguments(model, out, *CALIBRATED, "--calibration", str(tmp_path / "rows.jsonl")))
    assert "line 2: expected a JSON object with a string field 'text'" in message


def test_tokens_outside_the_vocabulary(refused, tmp_path, out):
    model = tiny_folder(tmp_path / "small-vocabulary", vocab=1000)
    message = refused(arguments(model, out, *CALIBRATED))
    assert "but the model's vocabulary has 1000 entries (0 to 999): this tokenizer does not belong" in message


def test_a_model_without_a_tokenizer(refused, model, out):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "has no tokenizer files" in refused(arguments(model, out, *CALIBRATED))


# --- the model


def test_a_missing_folder(refused, tmp_path, out):
    message = refused(arguments(tmp_path / "missing", out, *CALIBRATED))
    assert str(tmp_path / "missing") in message and "no such model folder" in message


def test_a_folder_that_is_no_model(refused, tmp_path, out):
    (tmp_path / "photos").mkdir()
    message = refused(arguments(tmp_path / "photos", out, *CALIBRATED))
    assert message == f"{tmp_path / 'photos'} has no config.json, so it is not a model folder"


def test_a_folder_that_is_quantized_already(refused, packed, tmp_path, out):
    folder = shutil.copytree(packed, tmp_path / "packed")
    message = refused(arguments(folder, out, *CALIBRATED))
    assert message == f"{folder} is quantized already (quant_method 'compressed-tensors'); give the unquantized model"


def corrupt_header(shard):
    data = bytearray(shard.read_bytes())
    data[8:40] = b"\xff" * 32
    shard.write_bytes(data)


def absurd_header_size(shard):
    shard.write_bytes(struct.pack("<Q", 2**60) + shard.read_bytes()[8:])


def cut(keep):
    def truncate(shard):
        shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])

    return truncate


DAMAGE = {
    "header overwritten": corrupt_header,
    "header size": absurd_header_size,
    "emptied": cut(0),
    "cut in the header": cut(0.0005),
    "cut in half": cut(0.5),
    "one byte short": lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_or_truncated_shard(refused, model, out, damage):
    damage(model / "model.safetensors")
    message = refused(arguments(model, out, *CALIBRATED))
    assert message.startswith(f"{model / 'model.safetensors'} is corrupt or truncated: ")


def test_a_missing_shard(refused, model, out):
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(arguments(model, out, *CALIBRATED))
    assert "the shard model-00001-of-00002.safetensors named by model.safetensors.index.json is missing" in message


def test_weights_that_are_missing_are_never_random(refused, model, out):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refused(arguments(model, out, *CALIBRATED))
    assert "weights missing from the folder: ['model.layers.1.mlp.up_proj.weight']" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_weights_that_are_not_finite(refused, tmp_path, out, name, value):
    model = tiny_folder(tmp_path / "broken", damage=lambda m: m.get_parameter(name).view(-1)[5:6].fill_(value))
    message = refused(arguments(model, out, *CALIBRATED))
    assert message == f"{name} contains NaN or infinite values; the model cannot be quantized"


def test_a_config_that_is_not_json(refused, model, out):
    (model / "config.json").write_text('{"model_type": "llama", ')
    message = refused(arguments(model, out, *CALIBRATED))
    assert message.startswith(f"{model / 'config.json'} is not a readable JSON file")


# --- a packed folder that is loaded


COMMANDS = {
    "eval": ["--data", TEXT, "--seq-len", "32", "--max-windows", "1", "--device", "cpu"],
    "inspect": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_hash(refused, packed, tmp_path, command):
    folder = shutil.copytree(packed, tmp_path / "packed")
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1  # a single bit of a weight: no other check can see it
    shard.write_bytes(data)
    message = refused([command, str(folder), *COMMANDS[command]])
    assert message.startswith(f"{shard} is not the file that was written: sha256 ")
    assert "(corrupt, or changed afterwards)" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_wrong_hash_of_another_file(refused, packed, tmp_path, name):
    folder = shutil.copytree(packed, tmp_path / "packed")
    with (folder / name).open("a") as file:
        file.write("\n")
    message = refused(["eval", str(folder), *COMMANDS["eval"]])
    assert message.startswith(f"{folder / name} is not the file that was written")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_shard_without_hashes(refused, packed, tmp_path, command, damage):
    folder = shutil.copytree(packed, tmp_path / "packed")
    (folder / "lowbit.json").unlink()
    damage(folder / "model.safetensors")
    message = refused([command, str(folder), *COMMANDS[command]])
    assert message.startswith(f"{folder / 'model.safetensors'} is corrupt or truncated: ")


# --- the output


def test_an_output_that_exists_is_refused_without_overwrite(refused, model, tmp_path):
    (tmp_path / "out").mkdir()
    message = refused(["quantize", str(model), str(tmp_path / "out"), *CALIBRATED])
    assert message == f"the output folder {tmp_path / 'out'} exists; choose another name or allow overwriting"


def test_a_folder_that_is_no_model_is_not_overwritten(refused, model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"\xff\xd8")
    message = refused(arguments(model, tmp_path / "photos", *CALIBRATED))
    assert "has no config.json, so it is not a model and is not replaced" in message


def test_an_output_that_is_a_file(refused, model, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "exists and is not a folder" in refused(arguments(model, tmp_path / "out", *CALIBRATED))


@pytest.mark.parametrize("place", ["model", "model/w4", "model/../model/a/b", "."])
def test_an_output_inside_or_around_the_model(refused, model, tmp_path, place):
    message = refused(["quantize", str(model), str(tmp_path / place), "--overwrite", *CALIBRATED])
    assert "must be outside the input folder" in message or "must be a folder with a name" in message


# --- a full disk, and Ctrl-C


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from lowbit.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_file_system_that_refuses_to_write(model, out, tmp_path):
    """Files end at 1 MB here; the model's shard is larger."""
    before = tree(tmp_path)
    command = [sys.executable, "-c", LIMITED, "1000000", *arguments(model, out, *CALIBRATED, "--method", "rtn")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 2, done.stderr
    message = one_message(done.stdout, done.stderr)
    assert "File too large" in message and "cannot write" in message and out.name in message
    assert tree(tmp_path) == before


def mounts_are_allowed():
    probe = "mount -t tmpfs none /mnt"
    unshare = shutil.which("unshare")
    return (
        unshare is not None and not subprocess.run([unshare, "-Urm", "sh", "-c", probe], capture_output=True).returncode
    )


@pytest.mark.skipif(not mounts_are_allowed(), reason="no unprivileged mount of a small disk here")
@pytest.mark.parametrize("too_much", ["tokenizer.json", "model.safetensors", "lowbit.json"])
def test_a_full_disk(model, packed, tmp_path, too_much):
    """A real disk that is too small and holds an older result; what is left on it is listed before it goes."""
    pages = {path.name: -(-path.stat().st_size // 4096) for path in packed.iterdir()}
    fits = {
        "tokenizer.json": 20,
        "model.safetensors": 150,
        "lowbit.json": sum(pages.values()) - pages["lowbit.json"] + 2,
    }
    size = 4096 * fits[too_much]
    disk = tmp_path / "disk"
    disk.mkdir()
    before = tree(model)
    script = """
        mount -t tmpfs -o "size=$4" none "$1" && mkdir "$1/out" && echo '{}' > "$1/out/config.json" || exit 99
        "$2" -m lowbit quantize "$3" "$1/out" --method rtn --group-size 32 --overwrite
        echo "status $?"
        ls -A "$1" "$1/out"
    """
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", str(disk), sys.executable, str(model), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert done.stdout.split() == ["status", "2", f"{disk}:", "out", f"{disk}/out:", "config.json"]
    assert done.stderr.count("lowbit: error: ") == 1 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr
    assert too_much in done.stderr, "it got that far"
    assert tree(model) == before


@pytest.mark.parametrize("delay", [0.0, 0.7], ids=["at the start", "in the middle"])
def test_ctrl_c_while_quantizing(interruptible, out, tmp_path, delay):
    before, source = tree(tmp_path), tree(BOOKS_4M)
    options = ["--calibration", TEXT, "--samples", "16", "--seq-len", "256", "--device", "cpu"]
    command = [sys.executable, "-m", "lowbit", *arguments(BOOKS_4M, out, *options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        first = process.stderr.readline()
        assert first.startswith("plan: 28 weights"), first + process.stderr.read()
        time.sleep(delay)
        assert any(".tmp-" in path.name for path in out.parent.iterdir()), "it is at work"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    # Python ends by the signal itself if that came while a string was executed, in an import for one; a shell says 130.
    assert process.returncode in (130, -signal.SIGINT), stderr
    assert stdout == "" and stderr.count("lowbit: ") == 1 and stderr.endswith("lowbit: interrupted\n")
    assert "Traceback" not in stderr
    assert tree(tmp_path) == before and tree(BOOKS_4M) == source


def test_a_failure_in_the_middle_leaves_nothing(refused, model, out, monkeypatch):
    """Inputs that overflow only once the blocks run: the work has begun when it shows."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refused(arguments(model, out, *CALIBRATED), before_work=False)
    assert "NaN or infinite" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["no/such/model"], "no/such/model"), ([str(BOOKS_4M), "--dtype", "float23"], "float23")],
)
def test_a_mistyped_word_is_named_before_a_data_set_is_fetched(arguments, message, tmp_path, capsys, monkeypatch):
    """With no --calibration the text is wikitext2 from the hub: asking for it would be the first thing to fail."""
    importlib.import_module("lowbit.quantize")
    monkeypatch.setattr(
        sys.modules["lowbit.quantize"], "load_text", lambda *_, **__: pytest.fail("the text was fetched first")
    )
    assert main(["quantize", arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
