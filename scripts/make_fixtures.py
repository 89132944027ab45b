"""Write tests/fixtures: a tiny model quantized by other tools, with their own dequantized weights as the reference.

    python scripts/make_fixtures.py OUT CASE      run by scripts/make_fixtures, in a virtual environment of the peers

Each case becomes ``OUT/<case>/``: the folder as the peer wrote it (config.json, model.safetensors), and
``reference.safetensors`` with what the peer itself makes of it: its dense weights of a few layers and its logits.
``OUT/versions.json`` has the versions of everything that ran. lowbit is not imported here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCAB = 32
TOKENS = torch.arange(3, 3 + 24).reshape(2, 12) * 7 % VOCAB
REFERENCES = ("self_attn.k_proj", "mlp.down_proj")
PEERS = ("gptqmodel", "auto-round", "llmcompressor", "compressed-tensors", "transformers", "torch", "safetensors")


def base_model(folder: Path, dtype: torch.dtype, wide: bool, shift: float) -> None:
    """A one-layer Llama with random weights and a word-level tokenizer.

    Args:
        wide: every N a multiple of 64, which some peers need; otherwise odder sizes.
        shift: of down_proj's weights, so that zero points are not all in the middle. Positive weights have zero points
            of 0, negative ones of the largest code.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128 if wide else 96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2 if wide else 1, head_dim=32, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
        if "down_proj" in name:
            parameter.data += shift
    model.save_pretrained(folder)
    tokenizer(folder)


def tokenizer(folder: Path) -> None:
    """A word-level tokenizer of VOCAB words; the peers want one."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "w2", "bos_token": "w0", "eos_token": "w1", "pad_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def calibration(count: int = 32, length: int = 32) -> torch.Tensor:
    """Token windows. Skewed, so that input channels differ in size and act-order has something to sort."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(count, length, generator=generator).square() * (VOCAB - 3)).long() + 3


def keep(written: Path, out: Path, reference: dict[str, torch.Tensor]) -> None:
    """The weights and configurations of ``written``, and the reference beside them."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in sorted(written.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "quantize_config.json"):
            shutil.copyfile(path, out / path.name)
    reference = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in reference.items()}
    save_file(reference, out / "reference.safetensors")


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = dict(model.named_modules())
    return {f"model.layers.0.{name}": modules[f"model.layers.0.{name}"] for name in REFERENCES}


# --- GPTQModel ------------------------------------------------------------------------------------------------------


def gptqmodel(case: dict[str, Any], source: Path, out: Path) -> None:
    """Quantize with GPTQModel on the CPU; the reference is its own forward, on unit vectors and on tokens."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    written = source.parent / "written"
    config = QuantizeConfig(**case, offload_to_disk=False)
    model = GPTQModel.load(str(source), config)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration()]
    model.quantize(rows, batch_size=4)
    model.save(str(written))
    loaded = GPTQModel.load(str(written), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    reference = {}
    with torch.no_grad():
        for name, module in layers_of(loaded.model).items():
            # Its forward on the unit vectors: every output is one weight, nothing is summed.
            reference[f"{name}.weight"] = module(torch.eye(module.in_features, dtype=torch.float16)).t()
        reference["logits"] = loaded.model(TOKENS).logits
    keep(written, out, reference)


def open_in_gptqmodel(folder: Path) -> None:
    """Print the logits GPTQModel computes from a GPTQ or AWQ folder of someone else's, as JSON on the last line."""
    from gptqmodel import BACKEND, GPTQModel

    tokenizer(folder)
    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    kinds = sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__})
    with torch.no_grad():
        logits = model(TOKENS).logits.float()
    print(json.dumps({"logits": logits.tolist(), "kinds": kinds}))


# --- AutoRound ------------------------------------------------------------------------------------------------------


def auto_round(case: dict[str, Any], source: Path, out: Path) -> None:
    """Quantize with AutoRound; the reference is the dense model that it leaves in memory before packing."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    case = dict(case)
    form = case.pop("format")
    model = AutoModelForCausalLM.from_pretrained(source)
    words = AutoTokenizer.from_pretrained(source)
    rows = [{"input_ids": row[None]} for row in calibration()]
    rounder = AutoRound(
        model, words, dataset=rows, iters=4, nsamples=16, seqlen=32, batch_size=4, device_map="cpu", **case
    )
    written = source.parent / "written"
    rounder.quantize_and_save(output_dir=str(written), format=form, inplace=False)
    nested = [path.parent for path in written.rglob("model.safetensors")]
    reference = {}
    for name, module in layers_of(rounder.model).items():
        reference[f"{name}.weight"] = module.weight
    keep(nested[0], out, reference)


# --- llm-compressor -------------------------------------------------------------------------------------------------


def llmcompressor(case: dict[str, Any], source: Path, out: Path) -> None:
    """Quantize with llm-compressor; the reference is compressed-tensors' own decompression and forward."""
    from compressed_tensors.quantization import QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import CompressedTensorsConfig

    case = dict(case)
    modifier = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[case.pop("method", "rtn")]
    groups = {name: QuantizationScheme(**group) for name, group in case.pop("config_groups", {}).items()}
    recipe = modifier(ignore=["lm_head"], **({"config_groups": groups} if groups else {"targets": "Linear"}), **case)
    rows = Dataset.from_dict({"input_ids": calibration().tolist(), "attention_mask": [[1] * 32] * 32})
    model = AutoModelForCausalLM.from_pretrained(source)
    written = source.parent / "written"
    oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=32, num_calibration_samples=32)
    model.save_pretrained(written, save_compressed=True)
    reference: dict[str, torch.Tensor] = {}
    load = AutoModelForCausalLM.from_pretrained
    dense = load(written, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    for name, module in layers_of(dense).items():
        reference[f"{name}.weight"] = module.weight.bfloat16()
    with torch.no_grad():  # dense weights, but inputs still rounded where the scheme says so
        reference["logits"] = dense(TOKENS).logits
    keep(written, out, reference)


Peer = Callable[[dict[str, Any], Path, Path], None]
CASES: dict[str, tuple[Peer, dict[str, Any], dict[str, Any]]] = {}


def case(
    name: str, peer: Peer, dtype: torch.dtype = torch.float16, wide: bool = False, shift: float = -0.3, **options: Any
) -> None:
    CASES[name] = (peer, {"dtype": dtype, "wide": wide, "shift": shift}, options)


case("gptqmodel-v1-w4g32-sym", gptqmodel, bits=4, group_size=32, sym=True, format="gptq", act_group_aware=False)
case("gptqmodel-v1-w4g32-actorder", gptqmodel, bits=4, group_size=32, sym=True, format="gptq", desc_act=True,
     act_group_aware=False)  # fmt: skip
case("gptqmodel-v2-w4g32-asym-actorder", gptqmodel, bits=4, group_size=32, sym=False, format="gptq_v2", desc_act=True,
     act_group_aware=False)  # fmt: skip
case("gptqmodel-v2-w4g32-asym", gptqmodel, bits=4, group_size=32, sym=False, format="gptq_v2", act_group_aware=True)
case("gptqmodel-v1-w8ch-sym", gptqmodel, bits=8, group_size=-1, sym=True, format="gptq", act_group_aware=False)
case("gptqmodel-v2-w8g32-asym", gptqmodel, bits=8, group_size=32, sym=False, format="gptq_v2", act_group_aware=False)
case("gptqmodel-v1-w2g32-mixed", gptqmodel, bits=2, group_size=32, sym=True, format="gptq", act_group_aware=False,
     dynamic={r"+:.*down_proj": {"bits": 8, "group_size": 32}, r"-:.*k_proj": {}})  # fmt: skip
case("gptqmodel-awq-w4g32", gptqmodel, wide=True, bits=4, group_size=32, sym=False, method="awq", format="gemm")

ROUND = {"bits": 4, "group_size": 32}
case("autoround-awq-w4g32-asym", auto_round, **ROUND, sym=False, format="auto_awq")
case("autoround-gptq-w4g32-sym", auto_round, **ROUND, sym=True, format="auto_gptq")
case("autoround-gptq-w4g32-asym", auto_round, **ROUND, sym=False, format="auto_gptq")
case("autoround-gptq-w4g32-underflow", auto_round, shift=0.3, **ROUND, sym=False, format="auto_gptq")
# AutoRound's own quant_method. Its asymmetric packing is AWQ's, which 0.15.1 and 0.16.1 fail to write on a CPU.
case("autoround-native-w4g32-sym", auto_round, **ROUND, sym=True, format="auto_round")
case("autoround-native-mixed", auto_round, **ROUND, sym=True, format="auto_round", layer_config={
    "model.layers.0.self_attn.k_proj": {"bits": 8}, "model.layers.0.mlp.up_proj": {"bits": 16},
})  # fmt: skip
case("autoround-ct-w4g32-sym", auto_round, **ROUND, sym=True, format="llm_compressor")


def weights(bits: int, symmetric: bool, group_size: int | None, **more: Any) -> dict[str, Any]:
    strategy = "group" if group_size else "channel"
    fields = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **more}
    return {**fields, **({"group_size": group_size} if group_size else {})}


def activations(dynamic: bool, symmetric: bool = True) -> dict[str, Any]:
    strategy = "token" if dynamic else "tensor"
    return {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}


def one_group(weight: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weight, **more}}


BF16 = torch.bfloat16
case("llmcompressor-w4g32-sym-gptq", llmcompressor, BF16, method="gptq", config_groups=one_group(weights(4, True, 32)))
case("llmcompressor-w4g32-asym", llmcompressor, BF16, config_groups=one_group(weights(4, False, 32)))
case("llmcompressor-w8ch-sym", llmcompressor, BF16, config_groups=one_group(weights(8, True, None)))
case("llmcompressor-w4g32-actorder", llmcompressor, BF16, method="gptq",
     config_groups=one_group(weights(4, True, 32, actorder="weight")))  # fmt: skip
case("llmcompressor-mixed", llmcompressor, BF16, config_groups={
    "attention": {"targets": ["re:.*self_attn.*"], "weights": weights(8, True, None)},
    "mlp": {"targets": ["re:.*(gate|up)_proj"], "weights": weights(4, False, 32)},
    "down": {"targets": ["model.layers.0.mlp.down_proj"], "weights": weights(4, True, 32)},
})  # fmt: skip
case("llmcompressor-w8a8-dynamic", llmcompressor, BF16,
     config_groups=one_group(weights(8, True, None), input_activations=activations(True)))  # fmt: skip
case("llmcompressor-w8a8-static", llmcompressor, BF16,
     config_groups=one_group(weights(8, True, None), input_activations=activations(False)))  # fmt: skip
case("llmcompressor-w8a8-static-asym", llmcompressor, BF16,
     config_groups=one_group(weights(8, True, None), input_activations=activations(False, False)))  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and of every peer."""
    found = {"python": platform.python_version()}
    for name in PEERS:
        found[name] = importlib.metadata.version(name).split("+")[0]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--open", type=Path, metavar="FOLDER", help="print GPTQModel's logits of a copied folder")
    arguments = parser.parse_args()
    if arguments.open is not None:
        open_in_gptqmodel(arguments.open.resolve())
        return 0
    if arguments.list or arguments.out is None:
        print("\n".join(CASES))
        return 0
    arguments.out = arguments.out.resolve()
    for name in arguments.cases or CASES:
        peer, model, options = CASES[name]
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)  # GPTQModel writes logs to the current folder
            source = Path(scratch) / "tiny"
            base_model(source, **model)
            peer(options, source, arguments.out / name)
        print(f"wrote {arguments.out / name}", file=sys.stderr)
    (arguments.out / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
