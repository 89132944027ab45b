"""Which module may import which, the lean import, and the packages of the wheel."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}

# What each module may import besides the standard library: names of other distributions, and with a leading dot of
# modules of lowbit. A package's name stands for all its modules. A module that is not listed fails: decide first.
ALLOWED = {
    "lowbit": "public names only, see below",
    "lowbit.__main__": ".cli",
    "lowbit.spec": "",
    "lowbit.activations": ".spec",
    "lowbit.affine": "torch .spec",
    "lowbit.packing": "torch .spec",
    "lowbit.dtypes": "torch",
    "lowbit.modes": "torch",
    "lowbit.calib": "torch .spec .affine .calib",
    "lowbit.cpu": "torch .onednn .packing .affine .spec",
    "lowbit.registration": "torch",
    "lowbit.ops": "torch lowbit_kernels .cpu .registration .spec",
    "lowbit.int8": "torch .ops .registration",
    "lowbit.linear": "torch .cpu .dtypes .int8 .ops .pack_quantized .packing .affine .spec .stand_in",
    "lowbit.stand_in": "torch",
    "lowbit.blocks": "torch",
    "lowbit.reads": "torch .blocks",
    "lowbit.distributed": "torch",
    "lowbit.walk": "torch greenlet .blocks .cpu_forward .reads",
    "lowbit.report": ".spec",
    "lowbit.plan": "torch .experts .facts .report .spec .walk",
    "lowbit.routing": "torch",
    "lowbit.grouped": "torch .cpu .ops .registration .routing",
    "lowbit.grouped_int8": "torch .int8 .ops .registration .routing",
    "lowbit.stacked": "torch .cpu .grouped .grouped_int8 .linear .ops",
    "lowbit.experts": "torch .stacked",
    "lowbit.routed": "torch .calib .distributed .experts",
    "lowbit.linearize": "torch .experts .plan .spec .walk",
    "lowbit.blockwise": "torch .affine .calib .distributed .fold .folding .heap .mappings .onednn .report "
    ".routed .spec .walk",
    "lowbit.mixture": "torch .experts",
    "lowbit.mappings": "torch .mixture",
    "lowbit.fold": "torch .mappings .walk",
    "lowbit.folding": "torch .calib .distributed .fold .mappings .routed .spec",
    "lowbit.smooth": "torch .affine .distributed .fold .linear .mappings .walk",
    "lowbit.pack_config": ".spec",
    "lowbit.foreign_config": ".manifest .pack_config .spec",
    "lowbit.headers": ".manifest",
    "lowbit.pack_quantized": "torch .packing .affine",
    "lowbit.companions": "",
    "lowbit.manifest": "",
    "lowbit.heap": "",
    "lowbit.cpu_forward": "torch .onednn",
    "lowbit.onednn": "torch",
    "lowbit.writer": "torch safetensors . .headers .manifest",
    "lowbit.shards": "torch safetensors .headers",
    "lowbit.formats": "torch .affine .formats .foreign_config .pack_config .pack_quantized .packing .spec",
    "lowbit.formats.reordered": "torch .formats .affine .linear",
    "lowbit.checkpoint": "torch .affine .foreign_config .formats .headers .manifest .pack_config .pack_quantized "
    ".shards .writer",
    "lowbit.inspection": "torch .checkpoint .dtypes .hf .manifest .modes .pack_quantized .spec",
    "lowbit.hf": "torch transformers huggingface_hub safetensors peft fastapi jinja2 starlette uvicorn .facts .hf "
    ".calib .checkpoint .companions .cpu .dtypes .formats .manifest .activations .expand .experts .headers .heap "
    ".linear .int8 .linearize .modes .ops .pack_config .pack_quantized .packing .affine .report .spec",
    "lowbit.facts": ".foreign_config .headers .pack_config .spec",
    "lowbit.doctor": "rich .facts .hub_headers",
    "lowbit.limits": ".doctor .pack_config",
    "lowbit.hub_headers": "huggingface_hub .headers",
    "lowbit.expand": "torch .affine .checkpoint",
    "lowbit.convert": "torch .checkpoint .companions .dtypes .expand .formats .hf .manifest .modes .pack_config "
    ".progress",
    "lowbit.data": "torch datasets",
    "lowbit.windows": "torch .data",
    "lowbit.progress": "rich",
    "lowbit.evaluate": "torch .data .dtypes .progress .hf",
    "lowbit.run": "torch .activations .affine .blockwise .distributed .linear .linearize .plan .progress .report "
    ".smooth .walk",
    "lowbit.arguments": "torch .blockwise .data .evaluate .spec",
    "lowbit.quantize": "torch . .activations .arguments .blockwise .checkpoint .data .distributed .dtypes .evaluate "
    ".experts .hf .limits .linear .linearize .modes .pack_config .plan .reads .report .run .spec .walk .windows",
    "lowbit.vllm_plugin": "vllm .vllm_experts .vllm_gptq .vllm_kernel",
    "lowbit.vllm_gptq": "torch vllm",
    "lowbit.vllm_experts": "torch vllm .grouped .ops .spec .vllm_kernel",
    "lowbit.vllm_kernel": "torch vllm .ops .spec",
    "lowbit.cli": "typer . .activations .data .doctor .distributed .dtypes .heap .hf",
    "lowbit_kernels": "torch triton",
}

# What `calib` is kept from even where torch would offer it: it knows no module, no device, no file, no logger. A helper
# tensor may follow another tensor (`order.to(hessian.device)`); which device that is, is the caller's business.
NOT_IN_CALIB = {"nn", "cuda", "cpu", "open", "load", "save", "logging", "print", "logger"}


def modules():
    """Every module of the two packages: (dotted name, path, syntax tree)."""
    for root in (ROOT, ROOT / "kernels"):
        for package in ("lowbit", "lowbit_kernels"):
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                yield name, path, ast.parse(path.read_text(encoding="utf-8"))


MODULES = {name: (path, tree) for name, path, tree in modules()}


def imported(name, path, tree):
    """(full dotted name imported, node) for every import statement anywhere in the module, functions included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES else base), node


def rule_of(name):
    """The entry of ``ALLOWED`` for a module: its own or its package's, as a set."""
    while name not in ALLOWED and name.count(".") > 1:
        name = name.rpartition(".")[0]
    assert name in ALLOWED, f"{name} is a new module: say in ALLOWED what it may import"
    return set(ALLOWED[name].split())


def covers(rule, target):
    if target == "lowbit" or target.startswith("lowbit."):
        relative = target.removeprefix("lowbit") or "."
        return any(relative == entry or (entry != "." and relative.startswith(entry + ".")) for entry in rule)
    return target.partition(".")[0] in rule | sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"lowbit"}))
def test_a_module_imports_only_what_its_rule_allows(name):
    path, tree = MODULES[name]
    if name == "lowbit_kernels" or name.startswith("lowbit_kernels."):
        forbidden = [t for t, node in imported(name, path, tree) if not _fits_kernels(t, node)]
    else:
        forbidden = [t for t, _ in imported(name, path, tree) if not covers(rule_of(name), t)]
    assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(set(forbidden))}"


def _fits_kernels(target, node):
    """torch, triton, the standard library; its own modules by relative import only, so that the folder can be moved."""
    if target.partition(".")[0] == "lowbit_kernels":
        return isinstance(node, ast.ImportFrom) and node.level > 0
    return target.partition(".")[0] in {"torch", "triton"} | sys.stdlib_module_names


@pytest.mark.parametrize("distribution, owner", [("transformers", "lowbit.hf"), ("lowbit_kernels", "lowbit.ops")])
def test_some_names_are_imported_in_one_place_only(distribution, owner):
    for name, (path, tree) in MODULES.items():
        if name.partition(".")[0] == distribution or name == owner or name.startswith(owner + "."):
            continue
        assert distribution not in {t.partition(".")[0] for t, _ in imported(name, path, tree)}, name


def test_ops_imports_the_kernels_inside_functions_only():
    path, tree = MODULES["lowbit.ops"]
    at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    targets = [t for t, node in imported("lowbit.ops", path, tree) if node in at_import]
    assert targets and not [t for t in targets if t.partition(".")[0] in ("lowbit_kernels", "triton")]


def test_the_package_itself_imports_nothing_but_for_type_checkers():
    _, tree = MODULES["lowbit"]
    at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in at_import if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("lowbit.calib")])
def test_calibrators_know_tensors_only(name):
    _, tree = MODULES[name]
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not used & NOT_IN_CALIB, f"{name} uses {sorted(used & NOT_IN_CALIB)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            named = [argument.value for argument in given if isinstance(argument, ast.Constant)]
            assert not {"cpu", "cuda"} & set(named), f"{name} names a device: {ast.unparse(node)}"


# --- the lean import

LEAN = """
import sys, lowbit
assert "torch" not in sys.modules, "`import lowbit` alone needs no torch"
for name in lowbit.__all__:
    if name not in ("LowbitConfig", "install", "load", "uninstall"):  # which are about transformers, and so need it
        getattr(lowbit, name)
import torch
heavy = {"transformers", "datasets", "triton", "lowbit_kernels", "typer", "rich"} & set(sys.modules)
assert not heavy, f"imported: {heavy}"
assert not torch.cuda.is_initialized()
"""

NAMES_STAY_FUNCTIONS = """
import importlib, types, lowbit
for module in ("quantize", "evaluate"):
    loaded = importlib.import_module(f"lowbit.{module}")
    assert isinstance(loaded, types.ModuleType)
    assert getattr(lowbit, module) is getattr(loaded, module), module
    from_import = {}
    exec(f"from lowbit import {module}", from_import)
    assert from_import[module] is getattr(loaded, module), module
assert callable(lowbit.inspect) and callable(lowbit.load)
"""


@pytest.mark.parametrize("code", [LEAN, NAMES_STAY_FUNCTIONS], ids=["lean", "functions"])
def test_importing_the_package(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error_that_lists_the_public_ones():
    import lowbit

    with pytest.raises(AttributeError, match=r"quantise.*public names: .*quantize"):
        lowbit.quantise  # noqa: B018
    assert set(lowbit.__all__) <= set(dir(lowbit))


# --- packaging

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_wheels_packages_are_the_trees():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        name for name, (path, _) in MODULES.items() if path.name == "__init__.py"
    )
    folders = {path.parent for path, _ in MODULES.values()}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_kernels_is_a_source_root_and_no_package():
    """With an __init__.py it would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    folders = [p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert [name for name in folders if not name.endswith(".egg-info")] == ["lowbit_kernels"]


@pytest.mark.parametrize("folder", ["eval", "scripts", "tests"])
def test_no_script_is_named_like_a_dependency(folder):
    """`python eval/x.py` puts eval/ first on sys.path: a file datasets.py there would replace the library."""
    taken = sys.stdlib_module_names | {"kernels", "evaluate", "tokenizers", "numpy", "lowbit", "lowbit_kernels"}
    for requirement in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]:
        taken |= {requirement.split(">")[0].split("=")[0].split(";")[0].strip().replace("-", "_")}
    files = {path.stem for path in (ROOT / folder).rglob("*.py")}
    assert not files & taken
    assert not list((ROOT / folder).rglob("__init__.py"))
