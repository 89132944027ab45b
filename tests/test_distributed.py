"""Calibration on two ranks: the same result as one process, agreement before work, and an end when a rank is gone.

Real processes over gloo. One launch of tests/distributed_worker.py runs what can share a launch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import architectures
import lowbit
from distributed_worker import CASES, TEXT
from lowbit.blockwise import Calibration, own_batches
from lowbit.data import load_text
from lowbit.distributed import ALONE, LIMIT_VARIABLE, Ranks, Terminated, checksum, is_first, join, terminable
from packed_folder import edit_config, edit_tensors
from tiny_models import BOOKS_4M, tiny_folder

SPEC = lowbit.QuantSpec(bits=4)
ROOT = Path(__file__).parent.parent
SOURCES = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
ENV = {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def mixtral_folder(path: Path) -> None:
    """A tiny mixture of experts that reads the tokens of books-4m; one expert of 8 per token, so that some starve."""
    config = architectures.ARCHITECTURES["mixtral"].config()
    config.vocab_size, config.num_local_experts, config.num_experts_per_tok = 4096, 8, 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BOOKS_4M / name, path / name)


def variant(source: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """A copy of a folder with other weights."""
    shutil.copytree(source, path)
    edit_tensors(path, change)


def spread(model: Any) -> None:
    """Weights large enough that quantization shows."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    llama = tiny_folder(path / "llama", damage=spread)
    mixtral_folder(path / "mixtral")
    variant(llama, path / "llama-edited", lambda t: t["model.layers.1.mlp.down_proj.weight"][3, 5:6].fill_(0.5))
    huge = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")
    variant(llama, path / "llama-large", lambda t: [t[name].mul_(1e30) for name in huge])
    shutil.copytree(llama, path / "llama-eps")
    edit_config(path / "llama-eps", lambda config: config.update(rms_norm_eps=1e-3))
    (path / "other.txt").write_text(TEXT.read_text(encoding="utf-8").replace("Pip", "Tip"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What the two ranks of one launch wrote down."""
    command = [*TORCHRUN, str(ROOT / "tests" / "distributed_worker.py"), str(folder)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """Reports of the same cases by this one process."""
    cases = {name: case for name, case in CASES.items() if not name.endswith("again")}
    with one_thread():
        return {
            name: lowbit.quantize(folder / model, folder / f"{name}-1", **options).to_dict()
            for name, (model, options) in cases.items()
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """As the ranks have: the order in which a product adds depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digest(folder: Path) -> str:
    """Of the weights of a checkpoint."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# --- the same result as one process

SAME_BATCHES = [name for name in CASES if name not in ("few windows", "gptq again")]


@pytest.mark.parametrize("name", SAME_BATCHES)
def test_two_ranks_write_the_file_one_process_writes(folder, seen, alone, name):
    """Bit for bit: the batches are the same, and sums over them are kept in float64.

    A batch, or four that no two ranks share, adds float32 numbers, of 24 bits. A float64 sum has 53, so B additions
    whose entries lie within 2**(29 - log2 B) of each other are made without any rounding, in any order; where they do
    not, an error of B * 2**-53 must meet the boundary of a rounding to 24 bits to show. What follows is computed from
    equal bits.
    """
    assert digest(folder / f"{name}-2") == digest(folder / f"{name}-1")


@pytest.mark.parametrize("name", SAME_BATCHES)
def test_the_report_is_that_of_one_process(seen, alone, name):
    two, one = seen[0]["reports"][name], alone[name]
    assert two == seen[1]["reports"][name], "every rank returns rank 0's"
    for key in ("layers", "skipped", "coverage", "base_bytes", "packed_bytes", "linear_bits", "notes", "spec"):
        assert two[key] == one[key], key
    if one["calibration"] is not None:
        assert two["calibration"] == {**one["calibration"], "ranks": 2}, "all windows, whoever had them"


def test_experts_count_the_tokens_of_all_ranks(seen, alone):
    one, two = (
        [layer["notes"] for layer in report["layers"] if any("starved" in note for note in layer["notes"])]
        for report in (alone["experts"], seen[0]["reports"]["experts"])
    )
    assert one and one == two, "the notes name the tokens"


def test_the_same_ranks_write_the_same_bits_again(folder, seen):
    assert digest(folder / "gptq-2") == digest(folder / "gptq again-2")


def test_inside_a_process_group_that_exists(folder, seen):
    assert digest(folder / "in-a-group-2") == digest(folder / "gptq-2")
    assert all(rank["group kept"] for rank in seen)


def test_fewer_batches_than_ranks_cut_the_batches(folder, seen, alone):
    """Five windows are one batch of a single process and two of two ranks: here sums within batches differ too.

    That changes H by float32 rounding, as another number of threads does, and GPTQ's rounding amplifies it to other
    codes of equal quality. With 640 tokens for up to 768 inputs the KL to the base model scatters by 9 % between one
    and two threads of one process (5 to 12 windows), so two ranks are held to 20 %; with 32,000 tokens it is 5 %.
    """
    text = load_text(ROOT / "eval" / "data" / "books-test.txt", "test")
    kl = []
    for ranks in (1, 2):
        model, tokenizer = lowbit.load(folder / f"few windows-{ranks}", dtype="float32", device="cpu")
        found = lowbit.evaluate(model, tokenizer, text, base=BOOKS_4M, seq_len=128, max_windows=8, progress=False)
        kl.append(found.kl)
    assert kl[1] == pytest.approx(kl[0], rel=0.2)
    pairs = zip(seen[0]["reports"]["few windows"]["layers"], alone["few windows"]["layers"], strict=True)
    assert all(two["name"] == one["name"] for two, one in pairs)


# --- the command, and who speaks


def test_the_command_speaks_once(folder, seen):
    first, second = (rank["command"] for rank in seen)
    assert first["status"] == second["status"] == 0
    assert json.loads(first["stdout"])["calibration"]["ranks"] == 2
    assert first["stderr"].count("plan: ") == 1 and "28/28" not in second["stderr"]
    assert second["stdout"] == second["stderr"] == ""
    written = json.loads((folder / "by-command-2" / "lowbit.json").read_text(encoding="utf-8"))
    assert written["calibration"]["ranks"] == 2 and len(written["layers"]) == 28


def test_the_command_on_a_model_in_bfloat16(folder, seen):
    options = {"samples": 9, "seq_len": 256, "group_size": 64, "verbose": False}
    with one_thread():
        lowbit.quantize(BOOKS_4M, folder / "by-command-1", calibration=TEXT, **options)
    assert digest(folder / "by-command-2") == digest(folder / "by-command-1")


# --- disagreement

DIFFERS = "all ranks must be given the same work, but rank 1 of 2 differs from rank 0 in "


def test_the_command_refuses_on_both_ranks(seen):
    for rank in seen:
        refused = rank["bad command"]
        assert refused["status"] == 2 and refused["stdout"] == ""
        assert refused["stderr"].startswith(f"lowbit: error: {DIFFERS}the argument spec: QuantSpec(bits=8")
        assert refused["stderr"].count("\n") == 1


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("weights", "the model's weight model.layers.1.mlp.down_proj.weight: float32 [64, 128] checksum "),
        ("config", "the model's config.json at rms_norm_eps: 0.001 instead of 1e-06"),
        ("text", "the calibration text: sha256 "),
        ("bits", "the argument spec: QuantSpec(bits=8"),
        ("ignore", "the argument ignore: ('down_proj',) instead of ()"),
    ],
)
def test_ranks_that_disagree_are_told_what_differs(folder, seen, what, named):
    told = [rank["disagreements"][what] for rank in seen]
    assert told[0] == told[1] and told[0].startswith(f"ValueError: {DIFFERS}{named}")
    assert not (folder / "refused").exists()


def test_what_one_rank_cannot_find_ends_the_others_too(seen):
    first, second = (rank["disagreements"]["missing"] for rank in seen)
    assert second.startswith("FileNotFoundError: ") and "no-such-model" in second
    assert first.startswith("RankError: rank 0 of 2 stops because rank 1 failed: ") and "no-such-model" in first


def test_rank_0_alone_judges_the_output(seen):
    first, second = (rank["disagreements"]["output"] for rank in seen)
    assert first.startswith("ValueError: the output ") and "must be outside the input folder" in first
    assert second.startswith("RankError: rank 1 of 2 stops because rank 0 failed: the output ")


def test_more_ranks_than_windows(seen):
    expected = "ValueError: 1 calibration windows cannot be spread over 2 ranks"
    assert all(rank["disagreements"]["windows"].startswith(expected) for rank in seen)


def test_inputs_that_overflow_are_refused_alike(folder, seen):
    told = [rank["disagreements"]["overflow"] for rank in seen]
    assert told[0] == told[1] and "NaN or infinite" in told[0]
    assert not (folder / "refused").exists()


# --- the exchanges themselves


def test_exchanges(seen):
    first, second = (rank["exchanges"] for rank in seen)
    assert first["share"] == [[0, 1], []] and second["share"] == [[2, 3, 4], [0]]
    for key, expected in {
        "collect": ["rank 0", "rank 1"],
        "first": "rank 0",
        "sum": [2.0, 10.0],
        "max": [1.0, 5.0, float("inf")],
        "small": [[0.0, 0.0]] * 3,
    }.items():
        assert first[key] == second[key] == expected, key
    whole = list(range(100))
    assert first["whole"] == [whole, "rank 0", [float(i) for i in whole]]
    assert second["whole"] == [whole, "rank 1", [float(i) for i in whole]]


def test_a_failure_between_exchanges_reaches_the_others(seen):
    assert seen[0]["failing"] == "RankError: rank 0 of 2 stops because rank 1 failed: a bad weight"
    assert seen[1]["failing"] == "ValueError: a bad weight"


def test_a_process_alone_exchanges_nothing():
    tensor = torch.tensor([1.0, float("nan")])
    assert ALONE.collect(3) == [3] and ALONE.first(lambda: 4) == 4
    assert ALONE.sum_(tensor) is tensor and ALONE.max_(tensor) is tensor and ALONE.whole(tensor, 2) is tensor
    assert ALONE.share(7) == range(7) and ALONE.rows(7) == slice(0, 7)
    ALONE.agree({"a": "b"})
    with join() as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_contiguous_and_even(count):
    for items in (0, 1, 6, 7, 100):
        shares = [Ranks(rank, count).share(items) for rank in range(count)]
        assert [i for share in shares for i in share] == list(range(items))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_that_are_added_at_once_are_one_ranks(count, device):
    """On a CPU four from 32 batches on and eight from 64, unless there are too few for that many ranks."""
    for batches in (7, 27, 28, 31, 32, 33, 50, 63, 64, 100):
        hows = [Calibration(SPEC, "gptq", torch.device(device), ranks=Ranks(rank, count)) for rank in range(count)]
        parts = [own_batches(batches, how) for how in hows]
        assert [i for part in parts for i in part] == list(range(batches))
        unit = 1 if device == "cuda" or batches < 32 else 4 if batches < 64 else 8
        assert all(part.start % unit == 0 for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 2 * unit - 1


def test_more_ranks_than_batches_added_at_once():
    parts = [
        own_batches(32, Calibration(SPEC, "gptq", torch.device("cpu"), ranks=Ranks(rank, 16))) for rank in range(16)
    ]
    assert [list(part) for part in parts] == [[2 * rank, 2 * rank + 1] for rank in range(16)]


def test_a_checksum_sees_one_bit():
    weight = torch.randn(5, 7, dtype=torch.bfloat16)
    other = weight.clone()
    other.view(torch.int16)[2, 3] ^= 1
    assert checksum(weight) == checksum(weight.clone()) != checksum(other)
    assert checksum(weight.t()) != checksum(weight), "the shape counts"
    assert checksum(torch.zeros(())).startswith("float32 [] checksum 0000")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK '2', WORLD_SIZE '2'"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "2", LIMIT_VARIABLE: "soon"}, f"{LIMIT_VARIABLE} must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", LIMIT_VARIABLE: "0"}, "from 1 on, got '0'"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch, variables, named):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(named)), join():
        pass


def test_sigterm_ends_a_process_in_order(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match=r"^terminated$"), terminable():
        assert is_first()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) is before
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not is_first()
    with pytest.raises(Terminated, match="one of them has ended"), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup starts its command so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with pytest.raises(Terminated, match=r"^the terminal was closed$") as stop, terminable():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(10)
    assert stop.value.status == 129 and signal.getsignal(signal.SIGHUP) is before


# --- a rank that is gone


@contextmanager
def two_ranks(out: Path, **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two `lowbit quantize` that share a calibration of some seconds, at the moment the work begins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--calibration", str(TEXT), "--samples", "128", "--seq-len", "512", "--device", "cpu"]
    command = [sys.executable, "-m", "lowbit", "quantize", str(BOOKS_4M), str(out), *options]
    processes = []
    try:
        for rank in ("0", "1"):
            place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            processes.append(
                subprocess.Popen(
                    command,
                    env={**ENV, **place, **variables},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        line = processes[0].stderr.readline()
        while line.startswith("[Gloo]"):  # torch 2.8
            line = processes[0].stderr.readline()
        assert line.startswith("plan: 28 weights"), line + processes[0].stderr.read()
        assert any(path.name.startswith(".out.tmp-") for path in out.parent.iterdir()), "it is at work"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ends(process: subprocess.Popen[str], message: str) -> None:
    """The process ends with status 2 and this message, soon."""
    stdout, stderr = process.communicate(timeout=180)
    said = [line for line in stderr.splitlines() if line.startswith("lowbit: ")]
    assert process.returncode == 2 and stdout == "" and "Traceback" not in stderr, stderr
    assert len(said) == 1 and said[0].startswith(f"lowbit: error: {message}"), stderr


def test_a_rank_that_is_killed_ends_the_other(tmp_path):
    with two_ranks(tmp_path / "out") as (first, second):
        second.kill()
        ends(first, "rank 0 of 2 stops: another rank has ended, or has not answered for 1800 seconds")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_hangs_ends_the_other_after_the_limit(tmp_path):
    with two_ranks(tmp_path / "out", **{LIMIT_VARIABLE: "10"}) as (first, second):
        second.send_signal(signal.SIGSTOP)
        ends(first, "rank 0 of 2 stops: another rank has ended, or has not answered for 10 seconds")
        second.send_signal(signal.SIGCONT)
        ends(second, "rank 1 of 2 stops: another rank has ended")
    assert list(tmp_path.iterdir()) == []
