"""Reading a packed folder, and everything a damaged one must be refused for."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.affine import dequantize
from lowbit.checkpoint import read_checkpoint
from packed_folder import TINY_LAYERS as LAYERS
from packed_folder import edit_config, edit_tensors, names_in, write_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "packed", LAYERS)


def test_a_folder_of_another_tool_loads_without_hashes(folder: Path) -> None:
    (folder / "lowbit.json").unlink()
    checkpoint = read_checkpoint(folder)
    assert not checkpoint.hashes_verified
    assert checkpoint.record is None


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        read_checkpoint(tmp_path / "nothing")
    (folder / "lowbit.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_checkpoint(folder)


def test_a_dense_folder_is_not_a_packed_one(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match="not quantized"):
        read_checkpoint(folder)


def test_a_changed_missing_or_unlisted_file_is_named(folder: Path) -> None:
    manifest = json.loads((folder / "lowbit.json").read_text())
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config + " ")
    with pytest.raises(ValueError, match=r"config\.json is not the file that was written"):
        read_checkpoint(folder)
    assert not read_checkpoint(folder, verify_hashes=False).hashes_verified
    (folder / "config.json").write_text(config)

    def with_files(files: dict[str, Any]) -> None:
        (folder / "lowbit.json").write_text(json.dumps({**manifest, "files": files}))

    with_files({**manifest["files"], "tokenizer.json": {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(ValueError, match=r"missing: \['tokenizer\.json'\]"):
        read_checkpoint(folder)
    with_files({name: entry for name, entry in manifest["files"].items() if name != "config.json"})
    with pytest.raises(ValueError, match=r"does not list \['config\.json'\]"):
        read_checkpoint(folder)
    for name in ("../outside", "/etc/hostname", "a/../../b"):
        with_files({**manifest["files"], name: {"sha256": "0" * 64, "bytes": 1}})
        with pytest.raises(ValueError, match="not a file inside the folder"):
            read_checkpoint(folder)
    for text in ("[]", "{", '{"files": {}}', '{"files": {"a": 1}}', '{"files": {}, "files": {}}', "[" * 100_000):
        (folder / "lowbit.json").write_text(text)
        with pytest.raises(ValueError, match=r"lowbit\.json"):
            read_checkpoint(folder)


def replace(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name])

    return change


def poke(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


UP, DOWN = "layers.0.up", "layers.0.down"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "nan scale": (replace(f"{UP}.weight_scale", poke((3, 1), float("nan"))), r"not zero, got nan at \[3, 1\]"),
    "infinite scale": (replace(f"{UP}.weight_scale", poke((0, 0), float("inf"))), "finite and not zero"),
    "zero scale": (replace(f"{UP}.weight_scale", poke((0, 0), 0.0)), r"not zero, got 0.0 at \[0, 0\]"),
    "scale dtype": (replace(f"{UP}.weight_scale", lambda t: t.double()), "weight_scale must be"),
    "scale groups": (replace(f"{UP}.weight_scale", lambda t: t[:, :1].contiguous()), r"\(5, 2\), got .* \(5, 1\)"),
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), "lacks .*weight_scale"),
    "no codes": (lambda t: t.pop(f"{UP}.weight_packed"), "lacks .*weight_packed"),
    "no shape": (lambda t: t.pop(f"{UP}.weight_shape"), "lacks .*weight_shape"),
    "codes dtype": (replace(f"{UP}.weight_packed", lambda t: t.long()), "weight_packed must be torch.int32"),
    "codes width": (replace(f"{UP}.weight_packed", lambda t: t[:, 1:].contiguous()), r"\(5, 8\), got"),
    "codes rows": (replace(f"{UP}.weight_packed", lambda t: t[1:].contiguous()), r"\(5, 8\), got"),
    "shape of another width": (replace(f"{UP}.weight_shape", poke((1,), 96)), "weight_packed must be"),
    "shape not divisible": (replace(f"{UP}.weight_shape", poke((1,), 63)), "does not divide K = 63"),
    "negative shape": (replace(f"{UP}.weight_shape", poke((0,), -5)), "positive sizes"),
    "huge shape": (replace(f"{UP}.weight_shape", poke((0,), 2**62)), "weight_packed must be"),
    "shape of three": (replace(f"{UP}.weight_shape", lambda t: torch.cat([t, t[:1]])), r"\(2,\), got .* \(3,\)"),
    "zero point of a symmetric layer": (
        lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32)}),
        "has weight_zero_point, but .* symmetric: True",
    ),
    "no zero point": (lambda t: t.pop(f"{DOWN}.weight_zero_point"), "has no weight_zero_point"),
    "zero point shape": (
        replace(f"{DOWN}.weight_zero_point", lambda t: t[1:].contiguous()), r"weight_zero_point must be .* \(2, 1\)"
    ),
    "bits after the last code": (replace(f"{DOWN}.weight_packed", poke((2, 3), -1)), "bits set after its last code"),
    "bits after the last zero": (
        replace(f"{DOWN}.weight_zero_point", poke((1, 0), -(2**31))), "bits set after its last code"
    ),
    "act-order": (lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}), "weight_g_idx"),
    "dense weight too": (lambda t: t.update({f"{UP}.weight": torch.zeros(5, 64)}), "must not have a tensor 'weight'"),
    "stray scale": (lambda t: t.update({"x.weight_scale": torch.ones(1, 1)}), "layer x .* lacks"),
    "targeted layer gone": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{UP}.")], f"targets {UP}, which is not packed"
    ),
    "unknown layer": (
        lambda t: t.update({name.replace(UP, "x"): t[name].clone() for name in list(t) if name.startswith(UP)}),
        "x is packed, but no config_group",
    ),
    "nothing packed": (lambda t: [t.pop(name) for name in list(t) if name != "norm.weight"], "no tensor is packed"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_agree_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


def test_a_negative_scale_is_read(folder: Path) -> None:
    """AutoRound's symmetric grids have them: minus the scale turns the longer side of the range around."""
    edit_tensors(folder, replace(f"{UP}.weight_scale", poke((4, 0), -1.0)))
    qw = read_checkpoint(folder).quantized_weight(UP)
    assert qw.scales[4, 0] == -1
    assert torch.equal(dequantize(qw)[4, :32], 8.0 - qw.codes[4, :32].float())


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out", LAYERS, max_shard_bytes=400)
    (folder / "lowbit.json").unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    read_checkpoint(folder)

    def with_map(weight_map: object) -> None:
        path.write_text(json.dumps({**index, "weight_map": weight_map}))

    weight_map = index["weight_map"]
    first, last = sorted(set(weight_map.values()))[0], sorted(set(weight_map.values()))[-1]
    with_map({**weight_map, "extra.weight": first})
    with pytest.raises(ValueError, match=r"disagree about the tensors \['extra\.weight'\]"):
        read_checkpoint(folder)
    with_map({**weight_map, "norm.weight": first if weight_map["norm.weight"] == last else last})
    with pytest.raises(ValueError, match="disagree"):
        read_checkpoint(folder)
    with_map({name: shard for name, shard in weight_map.items() if name != "norm.weight"})
    with pytest.raises(ValueError, match=r"disagree|norm\.weight"):
        read_checkpoint(folder)
    for shard in ("../model.safetensors", "/tmp/model.safetensors", "a/b.safetensors"):
        with_map({**weight_map, "norm.weight": shard})
        with pytest.raises(ValueError, match="not a file name in the folder"):
            read_checkpoint(folder)
    with_map(["norm.weight"])
    with pytest.raises(ValueError, match="weight_map must be a table"):
        read_checkpoint(folder)
    with_map(weight_map)
    (folder / last).rename(folder / "hidden")
    with pytest.raises(FileNotFoundError, match=last):
        read_checkpoint(folder)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has both"):
        read_checkpoint(folder)


def test_a_header_that_names_a_tensor_twice_is_refused(folder: Path) -> None:
    (folder / "lowbit.json").unlink()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size].rstrip()
    entry = json.dumps({"norm.weight": json.loads(header)["norm.weight"]}).encode()[1:-1]
    header = header[:-1] + b", " + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    load_file(path)  # the library does not mind
    with pytest.raises(ValueError, match="twice"):
        read_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_shard_is_named(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))] if isinstance(keep, float) else data[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file"):
        read_checkpoint(folder)
    (folder / "lowbit.json").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or truncated"):
        read_checkpoint(folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("pristine") / "packed", LAYERS, max_shard_bytes=700)


def damaged_copy(pristine: Path, name: str, data: bytes) -> Path:
    folder = pristine.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    (folder / name).write_bytes(data)
    return folder


@settings(max_examples=150)
@given(data=st.data())
def test_no_flipped_byte_goes_unnoticed_where_there_are_hashes(pristine: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in names_in(pristine) if name != "lowbit.json"]))
    content = bytearray((pristine / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises((ValueError, OSError)):
        read_checkpoint(damaged_copy(pristine, name, bytes(content)))


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_folder_without_hashes_is_read_or_refused_but_never_crashes(
    pristine: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(names_in(pristine)))
    content = bytearray((pristine / name).read_bytes())
    start = data.draw(st.integers(0, len(content)))
    junk = data.draw(st.binary(max_size=12))
    cut = data.draw(st.integers(0, 12))
    folder = damaged_copy(pristine, name, bytes(content[:start]) + junk + bytes(content[start + cut :]))
    try:
        checkpoint = read_checkpoint(folder, verify_hashes=False)
    except (ValueError, OSError):
        return
    for linear in checkpoint.linears:
        checkpoint.quantized_weight(linear)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths_of(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [at, *(path for key, child in children for path in paths_of(child, (*at, key)))]


@settings(max_examples=200)
@given(data=st.data(), junk=JSON)
def test_a_mutated_configuration_is_refused_or_means_the_same(pristine: Path, data: st.DataObject, junk: Any) -> None:
    original = read_checkpoint(pristine)
    config = copy.deepcopy(dict(original.config))
    path = data.draw(st.sampled_from([path for path in paths_of(config["quantization_config"]) if path]))
    parent = config["quantization_config"]
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = junk
    folder = damaged_copy(pristine, "config.json", json.dumps(config).encode())
    if (folder / "config.json").read_bytes() != (pristine / "config.json").read_bytes():
        with pytest.raises(ValueError):
            read_checkpoint(folder)
    (folder / "lowbit.json").unlink()
    try:
        found = read_checkpoint(folder)
    except ValueError:
        return
    assert found.linears == original.linears
