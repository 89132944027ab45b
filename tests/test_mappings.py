"""Folds of every family: found where they should be, and exact on blocks built from the real modelling code."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit.fold import apply_fold, exact_folds
from lowbit.mappings import Fold, norm_offset, reasons_without_fold, resolve

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")

LLAMA = [
    ("input_layernorm", QKV),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", GATED),
    ("mlp.up_proj", ("mlp.down_proj",)),
]
GEMMA = [*LLAMA[:2], ("pre_feedforward_layernorm", GATED), LLAMA[3]]
FOLDS = {
    "llama": LLAMA,
    "llama-bias": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": [
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("self_attn.qkv_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ("mlp.gate_up_proj", ("mlp.down_proj",)),
    ],
    "glm4": [
        *LLAMA[:2],
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ("mlp.gate_up_proj", ("mlp.down_proj",)),
    ],
    "phi": [("input_layernorm", (*QKV, "mlp.fc1")), ("self_attn.v_proj", ("self_attn.dense",))],
    "stablelm-parallel": [("input_layernorm", (*QKV, *GATED)), LLAMA[1], LLAMA[3]],
    "cohere": [("input_layernorm", (*QKV, *GATED)), LLAMA[1], LLAMA[3]],
    "gpt_neox": [
        ("input_layernorm", ("attention.query_key_value",)),
        ("attention.query_key_value", ("attention.dense",)),
        ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ],
    "opt": [
        ("self_attn_layer_norm", QKV),
        ("self_attn.v_proj", ("self_attn.out_proj",)),
        ("final_layer_norm", ("fc1",)),
        ("fc1", ("fc2",)),
    ],
    "opt-gelu": [
        ("self_attn_layer_norm", QKV),
        ("self_attn.v_proj", ("self_attn.out_proj",)),
        ("final_layer_norm", ("fc1",)),
    ],
    "olmo2": [LLAMA[1], LLAMA[3]],
    "nemotron": [*LLAMA[:2], ("post_attention_layernorm", ("mlp.up_proj",))],
    "opt-post-norm": [],
    "olmo-clip": [LLAMA[3]],
    "mixtral": LLAMA[:2],
    "gemma4_text": LLAMA[3:],
    "gpt2": [],
    "bloom": [],
    "falcon": [],
}
OPTIONS = {
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "glm4": {"head_dim": 8},
    "stablelm-parallel": {"use_parallel_residual": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt-gelu": {"ffn_dim": 48, "word_embed_proj_dim": 32, "activation_function": "gelu"},
    "opt-post-norm": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "olmo-clip": {"clip_qkv": 0.5},
    "mixtral": {"num_local_experts": 4},
    "gemma4_text": {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
}


def block_and_call(family: str) -> tuple[nn.Module, tuple, dict]:
    """First decoder block of a tiny random model in float64, with the arguments of a real call.

    The weights are larger than an initialiser's, and norms and biases are random too: a wrong fold then changes the
    output by its own size, and a forgotten bias is seen.
    """
    transformers = pytest.importorskip("transformers")
    kind = family.split("-")[0]
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **OPTIONS.get(family, {}),
        },
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 1)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    call = {}

    def catch(_: nn.Module, args: tuple, kwargs: dict) -> None:
        call.update(args=args, kwargs=kwargs)

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(torch.arange(3, 27).reshape(2, 12), use_cache=False)
    handle.remove()
    return layers[0], call["args"], call["kwargs"]


def run(block: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
    with torch.no_grad():
        out = block(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def random_scales(block: nn.Module, fold: Fold, seed: int = 1) -> torch.Tensor:
    """Scales between 1/3 and 3, equal where columns share a channel."""
    k = block.get_submodule(fold.balance[0]).in_features
    ids = torch.arange(k) if fold.channel_ids() is None else fold.channel_ids()
    draw = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (3 ** (2 * draw - 1))[ids]


@pytest.fixture(autouse=True)
def _quiet_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("family", FOLDS)
def test_each_family_has_exactly_its_folds(family: str) -> None:
    block, _, _ = block_and_call(family)
    found = resolve(block, family.split("-")[0])
    assert [(fold.smooth, fold.balance) for fold in found] == FOLDS[family]


@pytest.mark.parametrize("family", [name for name in FOLDS if FOLDS[name]])
def test_folding_leaves_the_blocks_output_unchanged(family: str) -> None:
    block, args, kwargs = block_and_call(family)
    expected = run(block, args, kwargs)
    branches = (expected - args[0]).norm()
    for fold in resolve(block, family.split("-")[0]):
        folded = copy.deepcopy(block)
        apply_fold(folded, fold, random_scales(block, fold))
        # Several families compute norms and softmax in float32 whatever the model's dtype: eps32 per operation.
        error = (run(folded, args, kwargs) - expected).norm() / branches
        assert error < 32 * torch.finfo(torch.float32).eps, f"{fold.smooth}: {error:.1e}"


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gemma3_text", "opt"])
def test_all_folds_of_a_block_together_change_nothing(family: str) -> None:
    block, args, kwargs = block_and_call(family)
    expected = run(block, args, kwargs)
    for seed, fold in enumerate(resolve(block, family)):
        apply_fold(block, fold, random_scales(block, fold, seed))
    assert (run(block, args, kwargs) - expected).norm() < 1e-5 * (expected - args[0]).norm()


def test_exact_folds_keeps_the_right_and_finds_the_wrong_and_restores_the_block() -> None:
    block, args, kwargs = block_and_call("qwen3")
    before = {name: value.clone() for name, value in block.state_dict().items()}
    folds = resolve(block, "qwen3")
    wrong_heads = replace(folds[1], channels=tuple(reversed(folds[1].channels)))
    wrong_reader = Fold("input_layernorm", QKV[:2])
    wrong_offset = replace(folds[2], norm_offset=1)
    through_activation = replace(folds[3], smooth="mlp.gate_proj")
    wrong = [wrong_heads, wrong_reader, wrong_offset, through_activation]
    good, bad = exact_folds(block, [*folds, *wrong], args, kwargs)
    assert good == folds
    assert bad == wrong
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_exact_folds_refuses_a_dtype_in_which_rounding_looks_like_a_wrong_fold() -> None:
    block, args, kwargs = block_and_call("llama")
    with pytest.raises(ValueError, match="bfloat16"):
        exact_folds(block.bfloat16(), resolve(block, "llama"), args, kwargs)


@pytest.mark.parametrize(
    ("family", "linear", "reason"),
    [
        ("phi", "mlp.fc2", "NewGELU"),
        ("gpt_neox", "mlp.dense_4h_to_h", "GELU"),
        ("opt-gelu", "fc2", "GELU"),
        ("opt-post-norm", "fc1", "do_layer_norm_before"),
        ("olmo2", "self_attn.q_proj", "no norm before it"),
        ("olmo-clip", "self_attn.o_proj", "clip_qkv"),
        ("olmo-clip", "mlp.gate_proj", "input_layernorm|post_attention_layernorm"),
        ("nemotron", "mlp.down_proj", "ReLUSquared"),
        ("gemma4_text", "self_attn.o_proj", "v_norm"),
        ("falcon", "self_attention.dense", "no folding table"),
        ("bloom", "mlp.dense_h_to_4h", "residual"),
    ],
)
def test_every_linear_without_a_fold_has_a_reason(family: str, linear: str, reason: str) -> None:
    block, _, _ = block_and_call(family)
    reasons = reasons_without_fold(block, family.split("-")[0])
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    covered = {name for fold in resolve(block, family.split("-")[0]) for name in fold.balance}
    assert set(reasons) == linears - covered
    assert any(part in reasons[linear] for part in reason.split("|"))


def test_an_unknown_linear_beside_the_projections_takes_the_folds_of_its_branch_away() -> None:
    block, _, _ = block_and_call("llama")
    block.self_attn.gate_proj = nn.Linear(32, 32)
    assert [fold.smooth for fold in resolve(block, "llama")] == ["post_attention_layernorm", "mlp.up_proj"]


def test_an_unknown_branch_that_may_read_the_norms_takes_their_folds_away() -> None:
    block, _, _ = block_and_call("llama")
    block.mamba = nn.Linear(32, 32)
    assert [fold.smooth for fold in resolve(block, "llama")] == ["self_attn.v_proj", "mlp.up_proj"]
    assert "mamba" in reasons_without_fold(block, "llama")["self_attn.q_proj"]


def test_an_unknown_norm_inside_a_branch_stops_its_folds() -> None:
    block, _, _ = block_and_call("llama")
    block.mlp.ffn_sub_norm = nn.LayerNorm(48)
    assert [fold.smooth for fold in resolve(block, "llama")] == ["input_layernorm", "self_attn.v_proj"]
    block.self_attn.attn_sub_norm = nn.LayerNorm(32)
    assert resolve(block, "llama") == []


class OnePlus(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias)


class Squared(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight.square() + 0.5, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_offset_is_found_by_running_the_norm(dtype: torch.dtype) -> None:
    assert norm_offset(nn.LayerNorm(24).to(dtype)) == 0
    assert norm_offset(nn.LayerNorm(24, bias=False).to(dtype)) == 0
    assert norm_offset(nn.RMSNorm(24).to(dtype)) == 0
    assert norm_offset(OnePlus(24).to(dtype)) == 1
    assert norm_offset(Squared(24).to(dtype)) is None
    assert norm_offset(nn.LayerNorm(24, elementwise_affine=False)) is None
    assert norm_offset(nn.Identity()) is None


def test_resolve_on_meta_is_an_error_and_not_an_empty_list() -> None:
    block, _, _ = block_and_call("llama")
    with pytest.raises(ValueError, match="meta device"):
        resolve(block.to("meta"), "llama")


@pytest.mark.parametrize("bad", [torch.ones(31), torch.zeros(32), torch.full((32,), float("nan")), -torch.ones(32)])
def test_bad_scales_are_refused_before_anything_changes(bad: torch.Tensor) -> None:
    block, _, _ = block_and_call("llama")
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(ValueError, match="finite and positive"):
        apply_fold(block, resolve(block, "llama")[0], bad)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_columns_that_share_a_value_row_must_share_their_scale() -> None:
    block, _, _ = block_and_call("llama")
    with pytest.raises(ValueError, match="read one channel"):
        apply_fold(block, resolve(block, "llama")[1], torch.arange(1.0, 33.0))


def test_folding_a_bfloat16_block_rounds_each_parameter_once() -> None:
    block, _, _ = block_and_call("llama")
    exact = copy.deepcopy(block)
    fold = resolve(block, "llama")[0]
    block.bfloat16()
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    scales = random_scales(block, fold)
    apply_fold(block, fold, scales)
    apply_fold(exact, fold, scales)
    for name in (fold.smooth, *fold.balance):
        got, want = block.get_submodule(name).weight.double(), exact.get_submodule(name).weight
        # bfloat16 has 8 significant bits, so one rounding is 2^-8 of the value; float32's own is far below the slack
        assert ((got - want).abs() <= want.abs() * 1.001 * 2**-8).all()
        assert block.get_submodule(name).weight.dtype == torch.bfloat16
