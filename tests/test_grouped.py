"""lowbit::grouped_packed_linear and the stacks of packed experts: against float64 and against expert by expert."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from architectures import ARCHITECTURES, logits, tiny, tokens
from helpers import assert_close, random_quantized, tolerance
from lowbit import QuantSpec, load, quantize_, set_batch_invariant
from lowbit.affine import QuantizedWeight, dequantize
from lowbit.checkpoint import CheckpointWriter
from lowbit.cpu import CPU_INT4, CPU_INT8, DISK, best_layout
from lowbit.experts import Experts, separate
from lowbit.grouped import grouped_packed_linear
from lowbit.linear import QuantLinear
from lowbit.ops import CUDA_TILES, from_disk, packed_linear
from lowbit.packing import pack_codes
from lowbit.quantize import _write as write_folder
from lowbit.spec import PACKED_BITS, ActivationSpec
from lowbit.stacked import GroupedLinear, StackedLinear

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SPECS = [QuantSpec(bits, group, symmetric) for bits in PACKED_BITS for group in (32, -1) for symmetric in (True, False)]
COUNTS = [0, 5, 0, 1, 40, 0]
"""Rows per expert: starved ones first, last and between; few and many, which cpu.py multiplies differently."""
MOE = [name for name, architecture in ARCHITECTURES.items() if architecture.experts]


def stack(
    spec: QuantSpec, count: int, n: int, k: int, dtype: torch.dtype, layout: str = DISK
) -> tuple[list[QuantizedWeight], tuple[Tensor, Tensor, Tensor | None]]:
    """Unpacked weights of ``count`` experts, and weight, scales and zeros in ``layout``, stacked."""
    weights, parts = [random_quantized(n, k, spec, dtype) for _ in range(count)], []
    for qw in weights:
        zeros = None if qw.zeros is None else pack_codes(qw.zeros, spec.bits, dim=0)
        parts.append(from_disk(pack_codes(qw.codes, spec.bits), qw.scales, zeros, bits=spec.bits, k=k, layout=layout))
    weight, scales, zero = zip(*parts, strict=True)
    return weights, (torch.stack(weight), torch.stack(scales), None if zero[0] is None else torch.stack(zero))


def ends_of(counts: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(dtype)


def float64(x: Tensor, counts: list[int], weights: list[QuantizedWeight], bias: Tensor | None) -> Tensor:
    out, begin = torch.zeros(len(x), len(weights[0].codes), dtype=torch.float64), 0
    for e, rows in enumerate(counts):
        mine = slice(begin, begin + rows)
        out[mine] = x[mine].double() @ dequantize(weights[e], torch.float64).t()
        out[mine] += 0 if bias is None else bias[e].double()
        begin += rows
    return out


# --- the operator


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_matches_float64_and_has_the_bits_of_expert_by_expert(spec: QuantSpec, dtype: torch.dtype) -> None:
    """In the layout of the disk and in the one that this CPU multiplies fastest with; rows 46 .. 49 are nobody's."""
    n, k = 64, 96
    fastest = best_layout(
        n, k, bits=spec.bits, symmetric=spec.symmetric, dtype=dtype, device=torch.device("cpu")
    )  # fmt: skip
    for layout in dict.fromkeys((DISK, fastest, CUDA_TILES)):
        weights, packed = stack(spec, len(COUNTS), n, k, dtype, layout)
        x, bias = torch.randn(sum(COUNTS) + 4, k).to(dtype), torch.randn(len(COUNTS), n).to(dtype)
        how = {"bits": spec.bits, "group_size": spec.group_size, "layout": layout}
        out = grouped_packed_linear(x, ends_of(COUNTS), *packed, bias, **how)
        assert out.dtype == dtype and not bool(out[sum(COUNTS) :].any())
        roundings = 3 if dtype == torch.bfloat16 else 1  # weights and bias are rounded to bf16 too
        assert_close(out, float64(x, COUNTS, weights, bias), **tolerance(dtype, roundings, k))
        begin = 0
        for e, rows in enumerate(COUNTS):
            one = [None if t is None else t[e] for t in packed]
            alone = packed_linear(x[begin : begin + rows], *one, bias[e], **how)
            assert torch.equal(out[begin : begin + rows], alone)
            begin += rows


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(rows: int, dtype: torch.dtype) -> None:
    weights, packed = stack(QuantSpec(8, -1), 3, 5, 7, torch.float32)
    counts = [0, rows, 0]
    x = torch.randn(rows, 7)
    out = grouped_packed_linear(x, ends_of(counts, dtype), *packed, None, bits=8, group_size=-1)
    assert out.shape == (rows, 5)
    assert_close(out, float64(x, counts, weights, None), **tolerance(torch.float32, k=7))


@pytest.mark.parametrize("layout", [DISK, CUDA_TILES])
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric: bool, layout: str) -> None:
    spec = QuantSpec(4, 32, symmetric)
    _, packed = stack(spec, 3, 16, 64, torch.float32, layout)
    x, bias = torch.randn(6, 64, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    torch.library.opcheck(
        torch.ops.lowbit.grouped_packed_linear.default, (x, ends_of([1, 0, 4]), *packed, bias, 4, 32, layout)
    )
    torch.library.opcheck(
        torch.ops.lowbit.grouped_packed_linear_backward.default,
        (torch.randn(6, 16), ends_of([1, 0, 4]), *packed, 4, 32, layout, 64),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4, 32, False), QuantSpec(8, -1), QuantSpec(2, 64)], ids=QuantSpec.label)
def test_gradients_of_x_and_bias(spec: QuantSpec, dtype: torch.dtype) -> None:
    n, k = 33, 128
    for layout in (DISK, CUDA_TILES):
        weights, packed = stack(spec, len(COUNTS), n, k, dtype, layout)
        x = torch.randn(sum(COUNTS) + 2, k).to(dtype).requires_grad_()
        bias = torch.randn(len(COUNTS), n).to(dtype).requires_grad_()
        grad = torch.randn(len(x), n).to(dtype)
        grouped_packed_linear(
            x, ends_of(COUNTS), *packed, bias, bits=spec.bits, group_size=spec.group_size, layout=layout
        ).backward(grad)
        assert x.grad is not None and bias.grad is not None and x.grad.dtype == dtype
        expected, sums, begin = torch.zeros(len(x), k).double(), torch.zeros(len(COUNTS), n).double(), 0
        for e, rows in enumerate(COUNTS):
            mine = slice(begin, begin + rows)
            expected[mine] = grad[mine].double() @ dequantize(weights[e], torch.float64)
            sums[e] = grad[mine].double().sum(0)
            begin += rows
        assert not bool(x.grad[sum(COUNTS) :].any())
        assert_close(x.grad, expected, **tolerance(dtype, 2 if dtype == torch.bfloat16 else 1, n))
        assert_close(bias.grad, sums, **tolerance(dtype, 1, max(COUNTS)))


def test_what_is_frozen_and_what_is_not_there() -> None:
    _, (weight, scales, _) = stack(QuantSpec(4, 32), 2, 8, 64, torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    how = {"bits": 4, "group_size": 32}
    out = grouped_packed_linear(x, ends_of([1, 2]), weight, scales.clone().requires_grad_(), None, None, **how)
    with pytest.raises(RuntimeError, match="no gradient for scales"):
        out.sum().backward()
    out = grouped_packed_linear(x, ends_of([1, 2]), weight, scales, None, None, **how)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_torch_compile_needs_no_break_and_sees_any_split() -> None:
    weights, packed = stack(QuantSpec(4, 32), 3, 16, 64, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def twice(x: Tensor, ends: Tensor) -> Tensor:
        return 2 * grouped_packed_linear(x, ends, *packed, None, bits=4, group_size=32)

    for counts in ([2, 0, 3], [0, 0, 9], [4, 4, 0]):
        x = torch.randn(sum(counts), 64)
        assert_close(twice(x, ends_of(counts)), 2 * float64(x, counts, weights, None), **tolerance(torch.float32, k=64))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(2, 3, 64)}, r"x must be \(T, K\)"),
        ({"x": torch.zeros(4, 32)}, "weight must be"),
        ({"x": torch.zeros(4, 64, dtype=torch.float64)}, "x must be"),
        ({"ends": torch.tensor([1.0, 2.0])}, r"ends must be \(E,\) int32 or int64 .* got \(2,\) torch.float32"),
        ({"ends": torch.tensor([1, 2, 4])}, "weight must hold the 3 experts of ends"),
        ({"ends": torch.tensor([], dtype=torch.int64)}, "with E at least 1"),
        ({"ends": torch.tensor([3, 2])}, r"ends must not decrease and lie in 0 \.\. 4"),
        ({"ends": torch.tensor([-1, 2])}, "ends must not decrease"),
        ({"ends": torch.tensor([1, 5])}, "ends must not decrease"),
        ({"bias": torch.zeros(1, 8)}, "bias must hold the 2 experts of ends"),
        ({"bias": torch.zeros(2, 7)}, "bias must be"),
        ({"zeros": torch.zeros(2, 8, 2, dtype=torch.int32)}, "zeros must be"),
        ({"bits": 3}, "packed widths are"),
        ({"layout": "mine"}, "layout must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_what_it_refuses(changed: dict[str, object], message: str) -> None:
    _, (weight, scales, _) = stack(QuantSpec(4, 32), 2, 8, 64, torch.float32)
    arguments = {"x": torch.zeros(4, 64), "ends": torch.tensor([1, 2]), "weight": weight, "scales": scales}
    arguments |= {"zeros": None, "bias": None, "bits": 4, "group_size": 32, "layout": DISK} | changed
    with pytest.raises(ValueError, match=message):
        grouped_packed_linear(**arguments)


def test_batch_invariance_is_refused_where_it_does_not_hold() -> None:
    _, packed = stack(QuantSpec(4, 32), 2, 8, 64, torch.float32)
    set_batch_invariant(True)
    try:
        with pytest.raises(RuntimeError, match="batch-invariant"):
            grouped_packed_linear(torch.zeros(4, 64), ends_of([1, 2]), *packed, None, bits=4, group_size=32)
    finally:
        set_batch_invariant(False)


# --- the module


class Merged(nn.Module):
    """Merged experts as transformers describes them, with every choice it offers."""

    def __init__(self, *, gate: bool = True, bias: bool = False, concatenated: bool = True, inner: int = 48) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_concatenated, self.is_transposed = gate, bias, concatenated, False
        self.num_experts, self.act_fn = 5, nn.SiLU()
        first, rows = ("gate_up_proj", 2 * inner) if gate else ("up_proj", inner)
        self.register_parameter(first, nn.Parameter(torch.randn(5, rows, 64) / 8))
        self.down_proj = nn.Parameter(torch.randn(5, 64, inner) / 8)
        if bias:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.randn(5, rows) / 8))
            self.down_proj_bias = nn.Parameter(torch.randn(5, 64) / 8)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate.clamp(max=7)) * (up + 1)


W4 = QuantSpec(4, -1)


def packed_experts(spec: QuantSpec = W4, dtype: torch.dtype = torch.float32, **choices: bool | int) -> Experts:
    experts = separate(Merged(**choices))
    for expert in experts:
        for name, linear in list(expert.named_children()):
            n, k = linear.weight.shape
            packed = QuantLinear.from_quantized(random_quantized(n, k, spec), linear.bias, dtype=dtype)
            setattr(expert, name, packed.repack())
    return experts


def routing(count: int = 9, k: int = 2, experts: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices and their weights; experts 0 and 3 get nothing, and one choice is nobody's."""
    chosen = torch.tensor([1, 2, 4])[torch.rand(count, 3).argsort(1)[:, :k]]
    chosen[-1:, -1] = experts
    return torch.randn(count, 64), chosen, torch.rand(count, k)


def test_a_module_in_common_calls_gives_what_it_gives_one_by_one() -> None:
    """Every choice of transformers', every layout of this CPU; bit for bit where rows are cut into the same chunks."""
    choices = [{}, {"gate": False}, {"bias": True, "concatenated": False}, {"inner": 40, "bias": True}]
    for choice in choices:
        for spec in (W4, QuantSpec(4, -1, False), QuantSpec(8, -1), QuantSpec(2, -1)):
            for dtype in (torch.float32, torch.bfloat16):
                experts = packed_experts(spec, dtype, **choice)
                for x, chosen, weights in (routing(), routing(40), routing(1), routing(0)):
                    x = x.to(dtype)
                    experts.take_apart()
                    expected = experts(x, chosen, weights)
                    assert experts.repack().stacked
                    out = experts(x, chosen, weights)
                    assert out.dtype == dtype and out.shape == x.shape
                    assert_close(out, expected, **tolerance(dtype, 4, 64))


def test_gate_and_up_share_a_stack_where_they_can() -> None:
    assert packed_experts().repack()._stacks == ("gate_up", "down")
    assert packed_experts(inner=40).repack()._stacks == ("gate", "up", "down")  # 40 rows end inside a unit of 16
    assert packed_experts(gate=False).repack()._stacks == ("up", "down")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True), (2, False)])
def test_names_values_and_memory_stay(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    experts = packed_experts(QuantSpec(bits, -1, symmetric), dtype, bias=True, inner=64)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    size = sum(p.nbytes for p in experts.parameters())
    dense = {name: m.dequantize() for name, m in experts.named_modules() if isinstance(m, QuantLinear)}
    experts.repack()
    assert sum(p.nbytes for p in experts.parameters()) == size, "moved, not copied"
    layouts = {m.layout for m in experts.modules() if isinstance(m, GroupedLinear)}
    assert layouts <= {DISK, CPU_INT4, CPU_INT8} and (dtype == torch.float32) <= (layouts == {DISK})
    after = experts.state_dict()
    assert list(after) == list(before) or set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) and after[name].is_contiguous() for name in before)
    for name, weight in dense.items():
        linear = experts.get_submodule(name)
        assert type(linear) is StackedLinear and torch.equal(linear.dequantize(), weight)
        assert [key for key, _ in linear.named_parameters()] == ["weight_shape"]
        x = torch.randn(3, linear.in_features).to(dtype)
        expected = x.double() @ weight.double().t() + linear.bias.double()
        assert_close(linear(x), expected, **tolerance(dtype, 3, linear.in_features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_and_files_have_stacks_of_their_own(dtype: torch.dtype) -> None:
    experts = packed_experts(QuantSpec(4, -1, False), dtype, bias=True, inner=64).repack()
    x, *choices = routing()
    routed = (x.to(dtype), *choices)
    expected = experts(*routed)
    copied = copy.deepcopy(experts)
    assert copied.stacked and torch.equal(copied(*routed), expected)
    unpickled = pickle.loads(pickle.dumps(experts))
    assert unpickled.stacked and torch.equal(unpickled(*routed), expected)
    file = io.BytesIO()
    torch.save(experts.state_dict(), file)
    file.seek(0)
    other = packed_experts(QuantSpec(4, -1, False), dtype, bias=True, inner=64).repack()
    assert not torch.equal(other(*routed), expected)
    other.load_state_dict(torch.load(file))
    assert other.stacked and torch.equal(other(*routed), expected)
    linear = copy.deepcopy(experts[1].up_proj)
    assert type(linear) is QuantLinear and torch.equal(linear.dequantize(), experts[1].up_proj.dequantize())
    with torch.no_grad():
        copied[1].up_proj.weight_scale.mul_(2)
    assert torch.equal(experts(*routed), expected), "a copy shares nothing"


def test_conversions_of_dtype_go_through() -> None:
    experts = packed_experts(QuantSpec(4, -1), inner=64).repack()
    x, chosen, weights = routing()
    expected = experts(x, chosen, weights)
    experts.to(torch.bfloat16)
    assert experts.stacked and experts[0].up_proj.weight_scale.dtype == torch.bfloat16
    assert_close(experts(x.bfloat16(), chosen, weights.bfloat16()), expected, **tolerance(torch.bfloat16, 8))


def test_a_replaced_projection_is_called() -> None:
    """As when an adapter is put on it: the common calls end, and no tensor is lost."""

    class Doubled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    experts = packed_experts().repack()
    routed = routing()
    expected = experts(*routed)
    for expert in experts:
        expert.down_proj = Doubled(expert.down_proj)
    assert not experts.stacked
    assert_close(experts(*routed), 2 * expected, **tolerance(torch.float32, 4, 64))
    assert all(type(m) is not StackedLinear for m in experts.modules())
    assert experts.why_not_stackable() == "down_proj: Doubled is no QuantLinear"
    assert not experts.repack().stacked and len(list(experts.parameters())) == 5 * 3 * 3


def test_what_cannot_be_stacked_stays_as_it_is() -> None:
    experts = packed_experts()
    experts[3].up_proj = QuantLinear.from_quantized(random_quantized(48, 64, QuantSpec(8, -1)))
    reason = experts.why_not_stackable()
    assert reason is not None and reason.startswith("up_proj: experts of different shapes")
    assert not experts.repack().stacked
    experts = packed_experts()
    experts[2].gate_proj.register_forward_hook(lambda *_: None)
    assert experts.why_not_stackable() == "gate_proj: something listens to the calls of a single expert"
    dense = separate(Merged())
    assert dense.why_not_stackable() == "gate_proj: Linear is no QuantLinear" and not dense.repack().stacked


def test_a_linear_in_a_stack_is_not_moved_or_loaded_alone() -> None:
    experts = packed_experts().repack()
    for change in (lambda m: m.half(), lambda m: m.load_state_dict(m.state_dict())):
        with pytest.raises(RuntimeError, match="the module of all experts"):
            change(experts[0].up_proj)


def test_gradients_pass_a_stack() -> None:
    experts = packed_experts(bias=True)
    x, chosen, weights = routing()
    grads = []
    for run in (experts, experts.repack()):
        leaf, share = x.clone().requires_grad_(), weights.clone().requires_grad_()
        run(leaf, chosen, share).square().sum().backward()
        grads.append((leaf.grad, share.grad))
        del run
    for grouped, alone in zip(grads[1], grads[0], strict=True):
        assert_close(grouped, alone, **tolerance(torch.float32, 8, 64))


def test_the_module_compiles_without_a_break() -> None:
    experts = packed_experts(bias=True, concatenated=False).repack()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for routed in (routing(), routing(17)):
        torch.testing.assert_close(compiled(*routed), experts(*routed))


# --- whole models


@pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small
@pytest.mark.parametrize("name", MOE)
def test_models_run_in_common_calls_once_quantized_or_loaded(name: str, tmp_path: Path) -> None:
    """tests/test_architectures.py has the rest of the way: names in the files, the dequantized twin, saving again."""
    model = tiny(name)
    report = quantize_(model, QuantSpec(4, 32, symmetric=name != "gpt_oss"), allow_partial=True)
    together = logits(model, tokens())
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, None, None, report)
    loaded, _ = load(tmp_path / "packed", device="cpu")
    for ready in (model, loaded):
        of_blocks = [module for module in ready.modules() if isinstance(module, Experts)]
        assert of_blocks and all(module.stacked and len(module._stacks) == 2 for module in of_blocks)
        assert_close(logits(ready, tokens()), together, **tolerance(torch.float32, 64, 128))
        for module in of_blocks:
            module.take_apart()
        assert_close(logits(ready, tokens()), together, **tolerance(torch.float32, 64, 128))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, of_layer_0",
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),  # merged in its own files too
    ],
)
@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(8, -1, True, ActivationSpec())], ids=QuantSpec.label)
def test_dense_experts_of_another_layer_keep_the_names_of_the_original(
    name: str, of_layer_0: str, spec: QuantSpec, tmp_path: Path
) -> None:
    """W8A8 tensors are called ``weight`` as dense ones are; only layer 0's may be merged in loading."""
    model = tiny(name)
    report = quantize_(model, spec, ignore=[r"layers\.0\.mlp\.experts", "lm_head"], allow_partial=True)
    expected = logits(model, tokens())
    with CheckpointWriter(tmp_path / "packed") as writer:
        write_folder(writer, model, None, None, report)
    loaded, _ = load(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(loaded, tokens()), expected)
    assert [isinstance(layer.mlp.experts, Experts) for layer in loaded.model.layers] == [False, True]
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "again")]
    assert of_layer_0 in files[0] and set(files[0]) == set(files[1])
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
