"""LoRA adapters of PEFT on a packed base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import Int8Linear, LowbitConfig, QuantLinear, QuantSpec
from lowbit.hf.lora import LORA_LAYERS, PackedLoraLinear
from packed_folder import BOOKS_4M, pack_folder
from tiny_models import tiny_folder

pytestmark = [
    pytest.mark.usefixtures("installed"),
    # Their names in transformers 5.17, which PEFT 0.21 calls too; 5.23 has others and says so.
    pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning"),
]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(5, 5 + 2 * 16).reshape(2, 16)


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """books-4m, hurt enough that an adapter has something to mend."""
    spec = QuantSpec(2, 64, False)
    out = tmp_path_factory.mktemp("packed") / "w2"
    return pack_folder(BOOKS_4M, out, lambda name: None if name == "lm_head" else spec)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model", vocab=256)


def load_tiny(folder: Path, **options: Any) -> Any:
    config = LowbitConfig(**{"bits": 4, "group_size": 32, **options})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    modules = (module for module in model.modules() if isinstance(module, (QuantLinear, Int8Linear)))
    return {f"{i}.{key}": t.clone() for i, module in enumerate(modules) for key, t in module.state_dict().items()}


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, labels=tokens).loss


def windows(file: str, tokenizer: Any, count: int, length: int = 64) -> Tensor:
    text = (BOOKS_4M.parent / file).read_text()[: 8 * count * length]
    return torch.tensor(tokenizer(text)["input_ids"][: count * length]).view(count, length)


def test_an_adapter_trains_to_a_lower_loss(two_bits: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(two_bits)
    _, tokenizer = lowbit.load(two_bits, device="cpu")
    train, held_out = windows("books-calib.txt", tokenizer, 64), windows("books-test.txt", tokenizer, 32)
    before = packed_state(base)
    with torch.no_grad():
        first = float(loss(base, held_out))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 4 * 7 and all(".lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for step in range(24):
        optimizer.zero_grad()
        loss(model, train[step % 8 :: 8]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        last = float(loss(model, held_out))
        assert last < first - 0.05  # nats per token, of text it was not trained on
        with model.disable_adapter():
            assert float(loss(model, held_out)) == first
    after = packed_state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1e6  # of the base nothing is in it
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(two_bits), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(held_out[:2]).logits, model(held_out[:2]).logits)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8, "group_size": None, "activations": "int8"}])
def test_gradients_are_those_of_the_dense_twin(options: dict[str, Any], tiny: Path) -> None:
    model = load_tiny(tiny, **options)
    twin = AutoModelForCausalLM.from_pretrained(tiny)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            twin.get_submodule(name).weight.data = module.dequantize(torch.float32)
        elif isinstance(module, Int8Linear):
            twin.get_submodule(name).weight.data = module.weight.float() * module.weight_scale
    gradients = []
    for base in (model, twin):
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False))
        loss(adapted, TOKENS).backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    rounding = 0.1 if "activations" in options else 1e-4  # int8 activations have steps of 1/127 of the largest
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).norm() <= rounding * expected.norm(), name


def test_checkpointing_gives_the_same_gradients(tiny: Path) -> None:
    found = []
    for enable in (False, True):
        base = load_tiny(tiny)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        if enable:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        model.train()
        loss(model, TOKENS).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert len(found[0]) == len(found[1]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_configuration_can_bring_its_own_layers(tiny: Path) -> None:
    """PEFT's extension point, which needs no install()."""
    lowbit.uninstall()
    with pytest.raises(ValueError, match=r"QuantLinear.* is not supported"):
        get_peft_model(load_tiny(tiny), LoraConfig(target_modules=["q_proj"]))
    config = LoraConfig(target_modules=["q_proj"])
    config._register_custom_module(LORA_LAYERS)
    model = get_peft_model(load_tiny(tiny), config)
    assert sum(isinstance(module, PackedLoraLinear) for module in model.modules()) == 2


def test_transformers_own_adapter_calls(tiny: Path, tmp_path: Path) -> None:
    model = load_tiny(tiny)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    with torch.no_grad():
        adapted = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    other = load_tiny(tiny)
    other.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, adapted)


def test_several_adapters_and_none(tiny: Path) -> None:
    base = load_tiny(tiny)
    with torch.no_grad():
        plain = base(TOKENS).logits
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    with torch.no_grad():
        one = model(TOKENS).logits
        model.set_adapter("two")
        two = model(TOKENS).logits
        mixed = model(TOKENS, adapter_names=["one", "two"]).logits
        # the rows go through the matmuls in other batches
        assert torch.allclose(mixed[0], one[0], atol=1e-5) and torch.allclose(mixed[1], two[1], atol=1e-5)
        assert not torch.allclose(one, two)
    unloaded = model.unload()
    with torch.no_grad():
        assert torch.equal(unloaded(TOKENS).logits, plain)


def test_dense_layers_keep_their_own_lora(tiny: Path) -> None:
    model = get_peft_model(load_tiny(tiny), LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert type(model.base_model.model.lm_head) is peft.tuners.lora.layer.Linear
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, PackedLoraLinear)


# --- what needs a dense weight is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA and VeLoRA need a dense weight"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
    ],
    ids=["dora", "pissa"],
)
def test_kinds_of_lora_that_need_the_weight(options: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(load_tiny(tiny), LoraConfig(target_modules=["q_proj"], **options))


def test_merging_is_refused_with_the_way_out(tiny: Path) -> None:
    model = get_peft_model(load_tiny(tiny), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"cannot be merged into packed weights.*lowbit convert IN OUT --to dense"):
        model.merge_and_unload()
