"""lowbit doctor: the table is complete and sound, what it recommends helps, and what folders of all kinds are told."""

from __future__ import annotations

import functools
import itertools
import json
import shlex
import shutil
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from lowbit.activations import build_spec
from lowbit.checkpoint import read_checkpoint, read_tensor_infos
from lowbit.cli import app, main
from lowbit.doctor import VERDICTS, Diagnosis, diagnose, fill, find_row, knowledge, meets
from lowbit.facts import check_up
from lowbit.headers import read_headers
from lowbit.ops import best_layout
from lowbit.spec import QuantSpec
from packed_folder import BOOKS_4M, edit_config, edit_tensors, random_layer, write_tiny

FIXTURES = Path(__file__).parent / "fixtures"
READABLE = [path for path in sorted(FIXTURES.iterdir()) if path.is_dir() and "static-asym" not in path.name]
TABLE = knowledge()
ROWS = {row["id"]: row for row in TABLE["rows"]}

# --- every question there is ----------------------------------------------------------------------------------------

FORMATS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...], tuple[str, ...], tuple[bool, ...]]] = {
    "pack-quantized": ((2, 4, 8), (-1, 32, 64, 128), (True, False), ("none",), (False,)),
    "int-quantized": ((8,), (-1,), (True, False), ("dynamic", "static"), (False,)),
    "gptq": ((2, 4, 8), (-1, 32, 64, 128), (True, False), ("none",), (True, False)),
    "gptq-v2": ((2, 4, 8), (-1, 32, 64, 128), (True, False), ("none",), (True, False)),
    "awq": ((4,), (-1, 32, 64, 128), (True, False), ("none",), (False,)),
    "dense": ((16,), (-1,), (True,), ("none",), (False,)),
}
FREE = {
    "experts": (True, False),
    "mixed": (True, False),
    "fused_differ": (True, False),
    "dtype": ("float32", "float16", "bfloat16"),
    "device": tuple(TABLE["devices"]),
}
SIZES = ("n", "k", "hidden")


def all_facts(sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    names = ("bits", "group_size", "symmetric", "activations", "act_order")
    for form, domains in FORMATS.items():
        for of_format in itertools.product(*domains):
            for free in itertools.product(*FREE.values()):
                facts = {
                    "format": form,
                    **dict(zip(names, of_format, strict=True)),
                    **dict(zip(FREE, free, strict=True)),
                }
                facts |= sizes
                if facts["act_order"] and facts["group_size"] == -1:
                    continue  # one group has no order
                if form != "dense" or not facts["experts"]:
                    for changes in ({}, *special(form, facts)):
                        yield {**facts, **ORDINARY, **changes}


ORDINARY = {
    "auto_round": False, "packed_held_dense": False, "packed_latent": False, "unlisted": False,
    "unlisted_router": False, "model_type": "llama",
}  # fmt: skip


def special(form: str, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Facts that are rarely other than ORDINARY, one at a time."""
    if form.endswith("-quantized"):
        yield {"unlisted": True}
        yield {"unlisted_router": True, "model_type": "qwen3_moe"}
    if form != "dense":
        yield {"packed_held_dense": True}
        yield {"packed_latent": True}
        yield from (
            {"model_type": name} for name in ("stablelm", "olmo", "jamba", "glm5_next", "gpt_bigcode", "qwen3_next")
        )
    if form != "dense" and facts["experts"]:
        yield from ({"model_type": name} for name in ("gpt_oss", "afmoe"))
    if form in ("gptq", "gptq-v2", "awq") and not (facts["act_order"] or facts["mixed"]):
        yield {"auto_round": True}


def test_every_question_has_an_answer() -> None:
    """With sizes of 1 no row that asks for divisibility counts; those that do then can only come on top."""
    for engine in TABLE["engines"]:
        rows = {**TABLE, "rows": [row for row in TABLE["rows"] if row["engine"] == engine]}
        for facts in all_facts(dict.fromkeys(SIZES, 1)):
            assert find_row(rows, engine, facts)["engine"] == engine


def witness(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Facts that this row answers."""
    when, rows = row["when"], [other for other in TABLE["rows"] if other["engine"] == row["engine"]]
    for other in itertools.product((1, 128), repeat=3):
        sizes = {name: when.get(f"{name}_multiple_of", size) for name, size in zip(SIZES, other, strict=True)}
        for facts in all_facts(sizes):
            if meets(when, facts, TABLE["sets"]) and find_row({**TABLE, "rows": rows}, row["engine"], facts) is row:
                return facts
    return None


@pytest.mark.parametrize("id_", ROWS)
def test_a_row_is_well_formed_and_needed(id_: str) -> None:
    row = ROWS[id_]
    assert [other["id"] for other in TABLE["rows"]].count(id_) == 1
    assert set(row) == {"id", "engine", "versions", "when", "verdict", "kernel", "why", "source", "verified"}
    assert row["engine"] in TABLE["engines"] and id_.startswith(row["engine"])
    assert row["versions"] and set(row["versions"]) <= set(TABLE["engines"][row["engine"]]["versions"])
    assert len(row["source"]) > 10 and row["verified"] in ("run", "read", "known")
    assert row["verdict"] in VERDICTS
    assert (row["verdict"] == "refused") == (row["kernel"] == "")
    assert row["why"] or row["verdict"] == "packed"
    for key, value in row["when"].items():
        for one in value if isinstance(value, list) else [value]:
            if key.endswith("_multiple_of"):
                assert key.removesuffix("_multiple_of") in SIZES and type(one) is int and one > 1
            elif key in ("auto_round", "packed_held_dense", "packed_latent", "unlisted", "unlisted_router"):
                assert one is True
            elif key == "model_type":
                assert isinstance(one, str)
            elif key in FREE:
                assert one in FREE[key] or (key == "device" and one in TABLE["sets"])
            else:
                index = (
                    ("bits", "group_size", "symmetric", "activations", "act_order").index(key)
                    if key != "format"
                    else -1
                )
                assert one in FORMATS if index < 0 else any(one in domains[index] for domains in FORMATS.values())
    assert witness(row) is not None, f"no question is answered by {id_}: the rows before it answer all of them"


def test_sets_and_versions_are_what_they_say() -> None:
    devices = list(TABLE["devices"])
    for name, members in TABLE["sets"].items():
        assert members == devices[devices.index(members[0]) :], name
    for name, engine in TABLE["engines"].items():
        assert engine["versions"] and any(row["engine"] == name for row in TABLE["rows"])


# --- what it recommends ---------------------------------------------------------------------------------------------

FIXES = {fix["command"]: fix for fix in TABLE["fixes"]}


@functools.cache
def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """A command of the table through the real parser, without running it."""
    name, *arguments = shlex.split(command)
    assert name == "lowbit"
    group: Any = typer.main.get_command(app)
    with group.commands[arguments[0]].make_context(arguments[0], arguments[1:]) as context:
        return arguments[0], dict(context.params)


def after(facts: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The facts of what the command writes, were it run on a checkpoint of these facts."""
    name, options = parsed(command)
    kept = ("model_type", "packed_held_dense", "packed_latent")
    facts = {**facts, **ORDINARY, **{name: facts[name] for name in kept}}
    anew = {
        **facts,
        "packed_held_dense": False,
        "packed_latent": False,
        "act_order": False,
        "activations": "none",
        "fused_differ": False,
        "mixed": False,
    }
    if name == "convert":
        to, dtype = options["to"], options["dtype"]
        if to == "dense":
            return {**anew, "format": "dense", "bits": 16, "group_size": -1, "symmetric": True}
        assert not facts["act_order"] and (facts["activations"] == "none" or to == "compressed-tensors")
        assert to != "awq" or (facts["bits"] == 4 and facts["n"] % 8 == 0)
        assert to != "gptq" or (facts["symmetric"] and facts["n"] % 16 == facts["k"] % 16 == 0)
        form = to
        if to == "compressed-tensors":
            form = "pack-quantized" if facts["activations"] == "none" else "int-quantized"
        kept = {"symmetric": facts["symmetric"] and to != "awq", "dtype": facts["dtype"] if dtype == "auto" else dtype}
        return {**facts, "format": form, **kept}
    assert (options["model"] == "ORIGINAL") == (facts["format"] != "dense")
    spec = build_spec(options["bits"], options["group_size"], options["symmetric"], options["activations"])
    spec.num_groups(facts["k"])
    changed = {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}
    if spec.activations is None:
        return {**anew, **changed, "format": "pack-quantized"}
    return {**anew, **changed, "format": "int-quantized", "activations": "dynamic"}


@pytest.mark.parametrize("command", FIXES)
def test_a_command_of_the_table_exists_and_does_what_the_table_says(command: str) -> None:
    fix = FIXES[command]
    assert set(fix) - {"instead_of"} == {"command", "when", "gives"}
    assert {name for _, name, _, _ in string.Formatter().parse(command) if name} <= {"model", "bits", "group_size"}
    assert set(fix.get("instead_of", VERDICTS)) <= set(VERDICTS)
    starts = 0
    for facts in all_facts({name: fix["when"].get(f"{name}_multiple_of", 128) for name in SIZES}):
        if facts["device"] == "cpu" and meets(fix["when"], facts, TABLE["sets"]):
            starts += 1
            assert after(facts, fill(command, facts, "a folder")) == {
                **facts,
                **fix["gives"],
                "auto_round": False,
                "unlisted": False,
            }
    assert starts


def test_what_is_recommended_is_better(tmp_path: Path) -> None:
    """Every folder of the fixtures: the command's facts have a better row on that engine and device."""
    seen = set()
    for path in READABLE:
        checkup = check_up(path)
        for found in diagnose(path).answers:
            for command in found.fixes:
                changed = [after(checkup.facts(kind, found.device), command) for kind in checkup.kinds]
                verdicts = [VERDICTS.index(find_row(TABLE, found.engine, facts)["verdict"]) for facts in changed]
                assert max(verdicts) < VERDICTS.index(found.verdict), (path.name, found, command)
                seen.add(command.replace(str(path), "IN"))
    assert {"lowbit convert IN OUT --to compressed-tensors", "lowbit convert IN OUT --to dense"} < seen


# --- the table against what can be run here -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_rows_of_lowbit_on_a_cpu_are_what_the_dispatch_does(dtype: torch.dtype) -> None:
    from lowbit import cpu

    if not cpu._aten_is_fast() or cpu._lane_order() is None or cpu._block() != 64:
        pytest.skip("the rows speak of a CPU with AVX-512")
    layouts = {"lowbit-cpu-int4": "cpu_int4", "lowbit-cpu-int8": "cpu_int8", "lowbit-cpu": "disk"}
    facts = next(all_facts({"n": 1, "k": 1, "hidden": 1}))
    name = str(dtype).removeprefix("torch.")
    for bits, symmetric, n, k in itertools.product((2, 4, 8), (True, False), (32, 64, 96), (13, 32, 80)):
        layout = best_layout(n, k, bits=bits, symmetric=symmetric, dtype=dtype, device=torch.device("cpu"))
        asked = {"format": "gptq", "bits": bits, "symmetric": symmetric, "device": "cpu", "dtype": name, "n": n, "k": k}
        assert layouts[find_row(TABLE, "lowbit", {**facts, **asked})["id"]] == layout, asked


@pytest.mark.parametrize("path", READABLE, ids=lambda path: path.name)
def test_headers_say_what_the_whole_check_says(path: Path) -> None:
    headers, infos = read_headers(path), read_tensor_infos(path)
    assert headers.keys() == infos.keys()
    for name, info in infos.items():
        assert (headers[name].shape, headers[name].nbytes, headers[name].shard) == (info.shape, info.nbytes, info.shard)
    checkup = check_up(path)
    if path.name == "autoround-gptq-w4g32-underflow":  # its values are damaged, its headers are not
        return
    linears = read_checkpoint(path).linears.values()
    assert sum(kind.layers for kind in checkup.kinds) == len(linears)
    assert sum(kind.weights for kind in checkup.kinds) == sum(n * k for n, k in (linear.shape for linear in linears))
    for kind in checkup.kinds:
        members = [linear for linear in linears if linear.spec == kind.spec]
        assert all(linear.shape[0] % kind.n == 0 and linear.shape[1] % kind.k == 0 for linear in members)
        assert kind.act_order or not any(linear.reordered for linear in members)


EXPECTED = {  # engine, device -> verdict
    "llmcompressor-w4g32-asym": {("vllm", "sm_90"): "packed", ("sglang", "sm_75"): "refused",
                                 ("transformers", "cpu"): "refused"},
    "llmcompressor-w4g32-sym-gptq": {("vllm", "cpu"): "packed", ("transformers", "sm_80"): "expanded"},
    "gptqmodel-v1-w4g32-actorder": {("vllm", "sm_80"): "refused", ("lowbit", "sm_80"): "packed"},
    "gptqmodel-v2-w8g32-asym": {("vllm", "sm_89"): "refused", ("tgi", "sm_80"): "wrong"},
    "llmcompressor-w8a8-dynamic": {("vllm", "sm_89"): "packed", ("vllm", "sm_100"): "refused",
                                   ("lowbit", "cpu"): "packed"},
    "gptqmodel-awq-w4g32": {("vllm", "sm_75"): "packed", ("transformers", "cpu"): "refused"},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_files_of_other_tools(name: str) -> None:
    verdicts = {(a.engine, a.device): a.verdict for a in diagnose(FIXTURES / name).answers}
    assert len(verdicts) == len(TABLE["engines"]) * len(TABLE["devices"])
    assert {place: verdicts[place] for place in EXPECTED[name]} == EXPECTED[name]


def answer(diagnosis: Diagnosis, engine: str, device: str) -> Any:
    return next(a for a in diagnosis.answers if (a.engine, a.device) == (engine, device))


def test_the_worst_layer_decides(tmp_path: Path) -> None:
    layers = {
        "a.0.up": random_layer(128, 128, QuantSpec(4, 32, True)),
        "a.0.o": random_layer(128, 128, QuantSpec(2, 32, True)),
    }
    diagnosis = diagnose(write_tiny(tmp_path / "two", layers))
    assert {kind.label() for kind in diagnosis.checkup.kinds} == {"pack-quantized w4g32sym", "pack-quantized w2g32sym"}
    found = answer(diagnosis, "vllm", "sm_80")
    assert (found.verdict, tuple(sorted(found.kernels))) == ("slow", ("Humming", "Marlin"))
    assert "2 bits" in found.why[0] and answer(diagnosis, "sglang", "sm_80").verdict == "refused"


def test_layers_that_engines_fuse_must_agree(tmp_path: Path) -> None:
    layers = {f"a.0.{name}": random_layer(64, 64, QuantSpec(4, 32, True)) for name in ("q_proj", "k_proj", "v_proj")}
    assert answer(diagnose(write_tiny(tmp_path / "same", layers)), "vllm", "sm_80").verdict == "packed"
    layers["a.0.k_proj"] = random_layer(64, 64, QuantSpec(8, 32, True))
    found = answer(diagnose(write_tiny(tmp_path / "other", layers)), "vllm", "sm_80")
    assert found.verdict == "refused" and "one matrix" in found.why[0]


def test_a_router_that_the_configuration_takes_for_packed(tmp_path: Path) -> None:
    """vLLM's router is a linear; convert repairs the list."""
    layers = {f"a.0.mlp.experts.{i}.up_proj": random_layer(128, 128, QuantSpec(4, 32, True)) for i in (0, 1)}
    folder = write_tiny(tmp_path / "moe", layers)
    edit_tensors(folder, lambda tensors: tensors.update({"a.0.mlp.gate.weight": torch.ones(2, 128)}))
    edit_config(folder, lambda config: config.update(model_type="qwen3_moe"))
    assert check_up(folder).unlisted_routers == ("a.0.mlp.gate",)
    found = answer(diagnose(folder), "vllm", "sm_90")
    assert found.verdict == "refused" and "router" in found.why[0]
    assert found.fixes[0] == f"lowbit convert {folder} OUT --to compressed-tensors"
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "compressed-tensors"]) == 0
    assert check_up(tmp_path / "out").unlisted_routers == ()
    assert answer(diagnose(tmp_path / "out"), "vllm", "sm_90").verdict == "packed"


def test_experts_are_told_from_other_layers(tmp_path: Path) -> None:
    layer = random_layer(64, 64, QuantSpec(8, -1, True))
    names = ("a.0.o_proj", "a.0.mlp.experts.0.up_proj", "a.0.mlp.experts.1.up_proj")
    diagnosis = diagnose(write_tiny(tmp_path / "moe", dict.fromkeys(names, layer)))
    assert [(kind.experts, kind.layers) for kind in diagnosis.checkup.kinds] == [(True, 2), (False, 1)]
    with pytest.raises(
        ValueError, match=r"a\.0\.mlp\.experts must hold experts 0 to 2, but up_proj of \[0\] is missing"
    ):
        diagnose(write_tiny(tmp_path / "no 0", {f"a.0.mlp.experts.{i}.up_proj": layer for i in (1, 2)}))
    found = answer(diagnosis, "vllm", "sm_80")  # hidden 64: not Marlin's, and others want groups
    assert found.verdict == "refused" and "groups" in found.why[0]
    assert found.fixes[0] == f"lowbit convert {tmp_path / 'moe'} OUT --to gptq"


def test_a_dense_model_is_told_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(BOOKS_4M), "--json"]) == 0
    fields = json.loads(capfd.readouterr().out)
    assert {a["verdict"] for a in fields["answers"]} == {"dense"}
    assert fields["checkup"]["kinds"][0]["spec"] is None and fields["checkup"]["kinds"][0]["weights"] > 3_000_000
    assert f"lowbit quantize {BOOKS_4M} OUT" in fields["answers"][0]["fixes"]


def test_the_report_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(FIXTURES / "gptqmodel-v1-w4g32-actorder")]) == 0
    out = capfd.readouterr().out
    assert "gptq w4g32sym act-order: 7 layers" in out
    assert "vLLM 0.33.0" in out and "refused" in out and "desc_act" in out
    assert (
        "lowbit quantize ORIGINAL OUT --bits 4 --group-size 32 --symmetric\n      for vLLM 0.33.0 (cpu - sm_120)" in out
    )
    assert max(map(len, out.splitlines()[5:20])) <= 120
    assert main(["doctor", str(FIXTURES / "gptqmodel-v1-w4g32-actorder"), "--json"]) == 0
    fields = json.loads(capfd.readouterr().out)
    rows = {row for a in fields["answers"] for row in a["rows"]}
    assert rows == fields["sources"].keys() and fields["engines"]["sglang"] == "SGLang 0.5.23"


def test_code_of_the_models_own_is_mentioned(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "gptqmodel-awq-w4g32", tmp_path / "m")
    edit_config(folder, lambda config: config.update(auto_map={"AutoModel": "own.Model"}))
    assert any("trust" in note for note in diagnose(folder).notes)
