# Sourced by scripts/demo and scripts/test: makes .venv with everything in it, and goes to the repository root.
#
# Needs Python 3.10 or newer with its venv module, and a package index. Where things come from is pip's own configuration
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf); besides it:
#   PYTHON              the interpreter to build .venv with (default: the first of python3, python3.13 ... that will do)
#   LOWBIT_TORCH_INDEX  index URL to take torch itself from, such as PyTorch's own index of CPU builds
# A second run finds the stamp of the first and installs nothing.
set -euo pipefail

# bash expands the path before it changes folders, so this works from anywhere.
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

is_usable_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_usable_python "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 or newer"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if is_usable_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "lowbit needs Python 3.10 or newer; python3 here is: $(python3 --version 2>&1 || echo missing)." \
        "Install one, or name it: PYTHON=/path/to/python3 $0"
}

make_venv() {
    local python
    # A .venv whose interpreter has been removed or replaced is rebuilt.
    if [ -x .venv/bin/python ] && is_usable_python .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1
    then
        return
    fi
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$("$python" --version) has no venv module (Debian and Ubuntu: apt install python3-venv)"
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' scripts/constraints.txt)
    if .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
        return
    fi
    if [ -n "${LOWBIT_TORCH_INDEX:-}" ]; then
        say "installing torch $version from LOWBIT_TORCH_INDEX"
        "${pip[@]}" --index-url "$LOWBIT_TORCH_INDEX" "torch==$version"
    elif has_nvidia_gpu; then
        say "NVIDIA GPU found: installing torch $version with CUDA (several GB)"
        "${pip[@]}" "torch==$version"
    # The local version label asks for a CPU build and for nothing else; whether one is on offer is up to pip's sources.
    elif "${pip[@]}" "torch==$version+cpu" 2>/dev/null; then
        say "no NVIDIA GPU: installed the CPU build of torch $version"
    else
        say "no NVIDIA GPU, and pip's sources offer no CPU build of torch: installing the default build of torch $version."
        [ "$(uname -s)" != Linux ] || say "On Linux that one brings several GB of CUDA packages; to avoid them," \
            "interrupt, and set LOWBIT_TORCH_INDEX to PyTorch's index of CPU builds."
        "${pip[@]}" "torch==$version"
    fi
}

install_all() {
    local constraints=(-c scripts/constraints.txt)
    say "installing dependencies; the first time takes a few minutes"
    install_torch
    .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null &&
        constraints+=(-c scripts/constraints-cpu.txt)
    "${pip[@]}" "${constraints[@]}" --editable '.[dev]'
}

stamp() {
    .venv/bin/python - <<'EOF'
import hashlib, pathlib, sys
names = ("pyproject.toml", "scripts/_setup.sh", "scripts/constraints.txt", "scripts/constraints-cpu.txt")
parts = [pathlib.Path(name).read_bytes() for name in names] + [sys.version.encode(), str(pathlib.Path.cwd()).encode()]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
EOF
}

make_venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
if [ "$(stamp)" != "$(cat .venv/lowbit-stamp 2>/dev/null)" ]; then
    install_all
    stamp >.venv/lowbit-stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
