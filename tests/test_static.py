"""ruff and mypy --strict are part of the tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "tool",
    [("ruff", "check"), ("ruff", "format", "--check"), ("mypy", "--strict", "-p", "lowbit", "-p", "lowbit_kernels")],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_the_tool_has_nothing_to_say(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernel_launchers_are_annotated():
    """mypy accepts functions without annotations in lowbit_kernels, for the sake of the jit functions alone."""
    for path in (ROOT / "kernels" / "lowbit_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert node.returns is not None and not missing, f"{path.name}: {node.name} {missing}"
