"""A packed folder whose files are not those that were written."""

from __future__ import annotations

import shutil

import pytest

from refusals import DAMAGE, TEXT

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
