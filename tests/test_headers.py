"""What lowbit doctor reads: headers alone, however large the files; and bad folders, one message each."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.cli import main
from lowbit.doctor import diagnose
from lowbit.headers import read_headers
from lowbit.spec import QuantSpec
from packed_folder import BOOKS_4M, decoder_only, edit_config, pack_folder
from sparse_folder import write_sparse

FIXTURES = Path(__file__).parent / "fixtures"

# --- headers only ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count what a process reads")
def test_a_70b_model_is_read_by_its_headers_alone(tmp_path: Path) -> None:
    shards = 15
    held = write_sparse(tmp_path / "70b", layers=80, shards=shards, hidden=8192, inner=28672)
    assert sum(path.stat().st_size for path in (tmp_path / "70b").iterdir()) > 35e9
    script = """
import sys
from pathlib import Path
from lowbit.doctor import diagnose
from lowbit.facts import check_up
def read(): return int(Path("/proc/self/io").read_text().split()[1])
folder = Path(sys.argv[1])
before = read()
own = read() - before
checkup = check_up(folder)
print(read() - before - 2 * own, checkup.kinds[0].weights, "torch" in sys.modules or "safetensors" in sys.modules)
print(next(a.kernels for a in diagnose(folder).answers if (a.engine, a.device) == ("vllm", "sm_90")))
"""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "70b")], env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    first, second = done.stdout.splitlines()
    read, weights, heavy = first.split()
    assert held <= int(read) <= held + 8 * shards + 256  # each length is read twice; /proc/self/io itself is a text
    assert int(weights) == 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192) and heavy == "False"
    assert "Machete" in second


# --- on the hub -----------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub client asks of a server, for one model ``me/model`` in the folder ``root``."""

    root: Path
    sent: dict[str, int]
    commit = "1" * 40

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        names = [path.name for path in self.root.iterdir()]
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.path.startswith("/api/models/me/model"):
            files = [
                {"type": "file", "path": n, "size": (self.root / n).stat().st_size, "oid": "a" * 40} for n in names
            ]
            body = files if "/tree/" in self.path else {"id": "me/model", "sha": self.commit, "siblings": []}
            self.reply(json.dumps(body).encode(), 200, {"Content-Type": "application/json"}, with_body)
        elif "/me/model/resolve/" in self.path and name in names:
            data = (self.root / name).read_bytes()
            first, last = 0, len(data) - 1
            if asked := self.headers.get("Range"):
                first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": self.commit}
            self.reply(part, 206 if asked else 200, headers, with_body)
            self.sent[name] = self.sent.get(name, 0) + with_body * len(part)
        else:
            self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"}, with_body)

    def reply(self, data: bytes, status: int, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """The server, and an environment in which the hub client talks to it."""
    handler = type("OneModel", (Hub,), {"root": tmp_path / "files", "sent": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    root = Path(__file__).parent.parent
    yield (
        handler,
        {
            **os.environ,
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        },
    )
    server.shutdown()
    thread.join()
    server.server_close()


def doctor(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowbit", "doctor", name, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_of_a_model_on_the_hub_the_headers_are_fetched(hub: tuple[type[Hub], dict[str, str]], tmp_path: Path) -> None:
    handler, environment = hub
    shutil.copytree(BOOKS_4M, handler.root)
    size = (handler.root / "model.safetensors").stat().st_size
    done = doctor("me/model", environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["checkup"]["path"] == "me/model" and found["answers"][0]["fixes"] == ["lowbit quantize me/model OUT"]
    assert 0 < handler.sent["model.safetensors"] <= 100_001 < size / 50  # what the hub client asks for at first
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    local = diagnose(handler.root).checkup
    assert found["checkup"]["tensor_bytes"] == local.tensor_bytes
    assert found["checkup"]["kinds"][0]["weights"] == local.kinds[0].weights


def test_a_model_that_is_not_on_the_hub(hub: tuple[type[Hub], dict[str, str]]) -> None:
    handler, environment = hub
    handler.root.mkdir()
    for name, message in {
        "you/other": "no model of that id could be read",
        "a/b/c": "cannot be a Hugging Face model id",
    }.items():
        done = doctor(name, environment)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("lowbit: error: ")


# --- bad folders ----------------------------------------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def cut_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 40)


def huge_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**63))


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(["a"], "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def other_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def section(**fields: Any) -> Any:
    return lambda folder: edit_config(folder, lambda config: config["quantization_config"].update(fields))


def not_packed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    shutil.copytree(BOOKS_4M, folder)
    (folder / "config.json").write_text(json.dumps(config))


BAD: dict[str, tuple[Any, str]] = {
    "no config": (no_config, "has no config.json"),
    "no weights": (no_weights, "has no weights"),
    "pickled weights": (pickled, "no pickled weights (pytorch_model.bin), save them as safetensors first"),
    "truncated": (truncated, "corrupt or truncated: its header says"),
    "header cut": (cut_header, "header is not readable"),
    "header too large": (huge_header, "header is not readable"),
    "shard missing": (missing_shard, "the shard model-00002-of-00002.safetensors named by"),
    "another index": (other_index, "disagree about the tensors"),
    "private method": (section(quant_method="mine"), "lowbit reads the quant_methods compressed-tensors"),
    "unknown format": (section(checkpoint_format="marlin"), "checkpoint_format must be one of"),
    "3 bits": (section(bits=3), "bits must be one of (2, 4, 8) to be read, got 3"),
    "other bits": (section(bits=8), "so its qweight must be (16, 64), got (8, 64)"),
    "another method": (section(quant_method="awq"), "does not divide K"),
    "not packed": (not_packed, "no tensor is packed that way"),
}


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_that_the_configuration_denies_are_a_contradiction(
    symmetric: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = QuantSpec(4, 128, symmetric=symmetric)
    folder = pack_folder(BOOKS_4M, tmp_path / "m", decoder_only(spec))
    assert main(["doctor", str(folder)]) == 0
    capfd.readouterr()

    def deny(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = not symmetric

    edit_config(folder, deny)
    assert main(["doctor", str(folder)]) == 2
    assert "weight_zero_point" in capfd.readouterr().err


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_a_bad_folder_is_one_message(
    damage: Any, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(FIXTURES / "gptqmodel-v1-w4g32-sym", tmp_path / "m")
    damage(folder)
    for extra in ([], ["--json"]):
        assert main(["doctor", str(folder), *extra]) == 2
        captured = capfd.readouterr()
        assert captured.out == "" and captured.err.startswith("lowbit: error: ") and captured.err.count("\n") == 1
        assert message in captured.err


def test_no_folder(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert "no such model folder" in capfd.readouterr().err


ENTRY = st.recursive(
    st.none() | st.integers(-2, 70) | st.sampled_from(["F16", "I32", "U3", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    header=st.binary(max_size=30) | st.dictionaries(st.sampled_from(["a.qweight", "b"]), ENTRY, max_size=3),
    data=st.binary(max_size=70),
)
def test_any_header_is_read_or_refused(header: bytes | dict[str, Any], data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        try:
            found = read_headers(Path(scratch))
        except ValueError as error:
            assert "model.safetensors" in str(error)
        else:
            assert sum(one.nbytes for one in found.values()) == len(data)
