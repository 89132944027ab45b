"""Which architectures' packed tensors SGLang takes up: tiny random models, packed by lowbit, loaded by SGLang.

    python scripts/sglang_architectures.py --out eval/results/sglang-architectures
    (in lowbit's environment; SGLang's own is that of scripts/check_sglang, made if absent)

For each architecture of tests/architectures.py that generates, SGLang meets the dense model as it is and the packed one
(W4 symmetric, groups of 64) with the stand-ins of scripts/check_sglang for kernels. Asked is only what every parameter
holds after loading, as there; whether the dense model runs says whose an error is. `unlisted` is Llama with nothing
packed and a quantization_config that does not say so: what a wrong ignore list does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import check_sglang
import sglang_environment as environment
import sglang_report
import sglang_tensors
import torch

import lowbit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # after check_sglang, which puts eval/ before: there is one of this name too

import architectures  # noqa: E402

DENSE, PACKED, UNLISTED = "dense", "packed", "unlisted"
ELSEWHERE = {"gpt_oss": "intel_amx"}
"""Attention that loads on a CPU; it does not compute without AMX."""
COLUMNS = ("architecture", "SGLang's class", "dense", "packed: loaded", "what is wrong")


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--env", type=Path, default=environment.default_folder(), help="SGLang's environment")
    about.add_argument("--only", default=",".join(names()), help="comma-separated: %(default)s")
    about.add_argument("--time-limit", type=int, default=120, help="seconds for one run of SGLang")
    about.add_argument("--out", type=Path, required=True, help="PREFIX of PREFIX.md and PREFIX.json")
    options = about.parse_args()
    if unknown := set(options.only.split(",")) - set(names()):
        about.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    options.model, options.dtype = Path("tests/architectures.py"), "float16"
    options.prompts, options.prompt_tokens, options.new_tokens, options.limit = 4, 24, 2, None
    python = environment.prepare(options.env)
    result = check_sglang.about(options, environment.installed(python))
    result["command"] = f"python scripts/sglang_architectures.py --out {options.out}"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        jobs = [job for name in options.only.split(",") for job in prepare(name, work, options)]
        (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        run = [str(options.env.absolute() / "bin" / "python"), str(ROOT / "scripts" / "sglang_run.py")]
        run.append(str(work / "jobs.json"))
        subprocess.run(run, env=environment.engine_environ(options.env), cwd=work, capture_output=True, check=True)
        result["rows"] = [judge(name, work) for name in options.only.split(",")]
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0


def names() -> list[str]:
    models = architectures.ARCHITECTURES.items()
    return [name for name, model in models if model.auto == "AutoModelForCausalLM"] + [UNLISTED]


def prepare(name: str, work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The model's two folders, and SGLang's jobs for them."""
    architectures._COMMON.update(hidden_size=256)  # Marlin's smallest sizes
    architectures._GATED.update(hidden_size=256, intermediate_size=256)
    dense, packed = work / f"{name}-{DENSE}", work / f"{name}-{PACKED}"
    architectures.tiny("llama" if name == UNLISTED else name, dtype=torch.bfloat16).save_pretrained(dense)
    lowbit.quantize(dense, packed, method="rtn", group_size=64, verbose=False)
    if name == UNLISTED:
        config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
        for file in packed.glob("*.safetensors"):
            file.unlink()
        (packed / "model.safetensors").symlink_to(dense / "model.safetensors")
        (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    prompts = architectures.tokens(options.prompts, options.prompt_tokens).tolist()
    jobs = []
    for folder in (dense, packed):
        place = folder.with_name(f"{folder.name}-run")
        place.mkdir()
        environ = {"LOWBIT_CHECK_LOADED": str(place), "LOWBIT_CHECK_STAND_INS": str(int(folder == packed))}
        job = {"model": str(folder), "prompts": prompts, "new_tokens": options.new_tokens, "dtype": options.dtype}
        job |= {"environ": environ, "folder": str(place), "time_limit": options.time_limit}
        job["dtype"] = "bfloat16" if name.startswith("gemma") else "float16"  # SGLang refuses float16 for Gemma
        jobs.append({**job, "attention_backend": ELSEWHERE.get(name, "torch_native")})
    return jobs


def judge(name: str, work: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "title": "Llama, nothing packed, ignore list empty"}
    if name != UNLISTED:
        row["title"] = architectures.ARCHITECTURES[name].title
    for kind in (DENSE, PACKED):
        place = work / f"{name}-{kind}-run"
        answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
        found = sglang_tensors.compare(work / f"{name}-{kind}", place) if (place / "loaded.json").exists() else {}
        row[kind] = {"error": answer.get("error"), **found}
    return row


def state(of: dict[str, Any]) -> str:
    """What became of a folder, in a cell."""
    if "tensors" not in of:
        return "not loaded"
    if any(of[fault] for fault in sglang_report.FAULTS):
        return "NO"
    return f"{of['tensors']} tensors in {of['parameters']}"


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Architectures that SGLang loads from packed files", "", f"`{result['command']}`", ""]
    lines += [sglang_report.versions(result), "", " ".join((__doc__ or "").split("\n\n")[-1].split()), ""]
    lines += ["No kernel of SGLang's was run; see sglang-cpu.md for what is stood in for and what `loaded` means.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in result["rows"]:
        packed = row[PACKED]
        faults = [f"{len(packed[f])} {words}" for f, words in sglang_report.FAULTS.items() if packed.get(f)]
        if packed["error"]:
            faults.append(" ".join(packed["error"].split())[:160].replace("|", "/"))
        loads = "loads, does not compute" if "tensors" in row[DENSE] else "fails as well"
        ran = loads if row[DENSE]["error"] else "runs"
        model = packed.get("model") or row[DENSE].get("model", "")
        lines.append(f"| {row['title']} | {model} | {ran} | {state(packed)} | {'; '.join(faults)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
