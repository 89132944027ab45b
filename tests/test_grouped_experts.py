"""Stacks of packed experts (lowbit/stacked.py, Experts): common calls against one by one, names, copies, kinds."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, tolerance
from lowbit import QuantSpec
from lowbit.cpu import CPU_INT4, CPU_INT8, DISK
from lowbit.experts import separate
from lowbit.linear import Int8Linear, QuantLinear
from lowbit.spec import ActivationSpec
from lowbit.stacked import GroupedLinear, InStack, StackedInt8Linear, StackedLinear
from merged_experts import W4, Merged, packed_experts, packed_linear_of, routing

DYNAMIC = QuantSpec(8, -1, True, ActivationSpec())
STATIC = QuantSpec(8, -1, False, ActivationSpec(dynamic=False))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [DYNAMIC, STATIC], ids=QuantSpec.label)
@pytest.mark.parametrize("choice", [{}, {"gate": False}, {"bias": True, "concatenated": False, "inner": 40}], ids=str)
def test_w8a8_experts_have_the_same_bits_in_common_calls(
    choice: dict[str, bool], spec: QuantSpec, dtype: torch.dtype
) -> None:
    experts = packed_experts(spec, dtype, **choice)
    for x, chosen, weights in (routing(), routing(40), routing(1), routing(0)):
        x = x.to(dtype)
        experts.take_apart()
        expected = experts(x, chosen, weights)
        assert experts.repack()._stacks == (("gate_up", "down") if choice.get("gate", True) else ("up", "down"))
        assert torch.equal(experts(x, chosen, weights), expected)


def test_static_scales_of_gate_and_up_that_differ_keep_them_apart() -> None:
    experts = packed_experts(STATIC)
    with torch.no_grad():
        experts[2].up_proj.input_scale.mul_(2)
    routed = routing()
    expected = experts(*routed)
    assert experts.repack()._stacks == ("gate", "up", "down")
    assert torch.equal(experts(*routed), expected)


KINDS: list[list[QuantSpec | None]] = [
    [W4, QuantSpec(8, -1)],
    [QuantSpec(4, -1, False), DYNAMIC, QuantSpec(2, -1)],
    [W4, None],
    [None, STATIC, W4],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("specs", KINDS, ids=lambda specs: "-".join("dense" if s is None else s.label() for s in specs))
def test_experts_of_several_kinds_are_a_call_each(specs: list[QuantSpec | None], dtype: torch.dtype) -> None:
    """Dense ones are called alone. Names and values stay, a copy and a conversion have the kinds again."""
    experts = packed_experts(specs, dtype, bias=True)
    state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    for routed in (routing(), routing(40), routing(0)):
        routed = routed[0].to(dtype), *routed[1:]
        experts.take_apart()
        expected = experts(*routed)
        assert experts.repack().stacked
        packed = sum(spec is not None for spec in specs)
        assert len(experts._stacks) == 2 * packed
        assert_close(experts(*routed), expected, **tolerance(dtype, 4, 64))
    after = experts.state_dict()
    assert set(after) == set(state) and all(torch.equal(after[name], state[name]) for name in state)
    routed = routing(40)
    routed = routed[0].to(dtype), *routed[1:]
    twin = pickle.loads(pickle.dumps(experts))
    assert twin._stacks == experts._stacks and torch.equal(twin(*routed), experts(*routed))
    twin.float()
    assert twin.stacked and {p.dtype for p in twin.parameters() if p.is_floating_point()} == {torch.float32}
    twin.load_state_dict(experts.float().state_dict())
    x, *choices = routed
    assert twin.stacked and torch.equal(twin(x.float(), *choices), experts(x.float(), *choices))


def test_a_projection_may_have_kinds_of_its_own() -> None:
    """Gate and up of one expert differ, so they are called apart; one expert's down projection is wider."""
    experts = packed_experts()
    experts[3].up_proj = packed_linear_of(nn.Linear(64, 48), QuantSpec(8, -1), torch.float32)
    experts[1].down_proj = packed_linear_of(nn.Linear(48, 64), QuantSpec(8, -1), torch.float32)
    routed = torch.randn(20, 64), torch.randint(5, (20, 2)), torch.rand(20, 2)
    expected = experts(*routed)
    assert experts.repack()._stacks == ("gate", "up", "up_1", "down", "down_1")
    assert_close(experts(*routed), expected, **tolerance(torch.float32, 4, 64))


def test_gate_and_up_share_a_stack_where_they_can() -> None:
    assert packed_experts().repack()._stacks == ("gate_up", "down")
    assert packed_experts(inner=40).repack()._stacks == ("gate", "up", "down")  # 40 rows end inside a unit of 16
    assert packed_experts(gate=False).repack()._stacks == ("up", "down")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spec",
    [W4, QuantSpec(4, -1, False), QuantSpec(8, -1), QuantSpec(2, -1, False), DYNAMIC, STATIC],
    ids=QuantSpec.label,
)
def test_names_values_and_memory_stay(spec: QuantSpec, dtype: torch.dtype) -> None:
    experts = packed_experts(spec, dtype, bias=True, inner=64)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    size = sum(p.nbytes for p in experts.parameters())
    dense = {name: m.dequantize() for name, m in experts.named_modules() if isinstance(m, (QuantLinear, Int8Linear))}
    ones = {name: torch.ones(1, weight.shape[1]).to(dtype) for name, weight in dense.items()}
    alone = {name: experts.get_submodule(name)(x) for name, x in ones.items()}
    experts.repack()
    shared = 0 if spec != STATIC else 5 * alone["0.gate_proj"].element_size()  # the scale of gate and up projection
    assert sum(p.nbytes for p in experts.parameters()) == size - shared, "moved, not copied"
    layouts = {m.layout for m in experts.modules() if isinstance(m, GroupedLinear)}
    assert layouts <= {DISK, CPU_INT4, CPU_INT8} and (dtype == torch.float32) <= (layouts == {DISK})
    stacked = StackedLinear if spec.activations is None else StackedInt8Linear
    after = experts.state_dict()
    assert list(after) == list(before) or set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) and after[name].is_contiguous() for name in before)
    for name, weight in dense.items():
        linear = experts.get_submodule(name)
        assert type(linear) is stacked and torch.equal(linear.dequantize(), weight)
        assert {key for key, _ in linear.named_parameters()} <= {"weight_shape"}
        assert torch.equal(linear(ones[name]), alone[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4, -1, False), STATIC], ids=QuantSpec.label)
def test_copies_and_files_have_stacks_of_their_own(spec: QuantSpec, dtype: torch.dtype) -> None:
    experts = packed_experts(spec, dtype, bias=True, inner=64).repack()
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
    other = packed_experts(spec, dtype, bias=True, inner=64).repack()
    assert not torch.equal(other(*routed), expected)
    other.load_state_dict(torch.load(file))
    assert other.stacked and torch.equal(other(*routed), expected)
    linear = copy.deepcopy(experts[1].up_proj)
    assert type(linear) is (Int8Linear if spec == STATIC else QuantLinear)
    assert torch.equal(linear.dequantize(), experts[1].up_proj.dequantize())
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
    assert all(not isinstance(m, InStack) for m in experts.modules())
    assert experts.why_not_stackable() == "down_proj: Doubled is no QuantLinear or Int8Linear"
    assert not experts.repack().stacked and len(list(experts.parameters())) == 5 * 3 * 3


def test_what_cannot_be_stacked_is_called_alone() -> None:
    """Something that listens to the calls of one expert hears them; where no expert stacks, all stay as they are."""
    experts, heard = packed_experts(), []
    experts[2].gate_proj.register_forward_hook(lambda _, given, out: heard.append(len(out)))
    routed = routing(40)
    expected = experts(*routed)
    assert experts.repack().stacked and type(experts[2].gate_proj) is QuantLinear
    heard.clear()
    assert_close(experts(*routed), expected, **tolerance(torch.float32, 4, 64))
    assert heard == [int((routed[1] == 2).sum())]
    for expert in experts.take_apart() or experts:
        expert.gate_proj.register_forward_hook(lambda *_: None)
    assert experts.why_not_stackable() == "gate_proj: something listens to the calls of a single expert"
    assert not experts.repack().stacked
    dense = separate(Merged())
    assert dense.why_not_stackable() == "gate_proj: Linear is no QuantLinear or Int8Linear"
    assert not dense.repack().stacked


def test_experts_spread_over_devices_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call cannot read weights of two devices. This machine may have one, so where they lie is pretended."""
    experts = packed_experts()
    places = {id(m): torch.device("cuda", e % 2) for e, expert in enumerate(experts) for m in expert.children()}
    monkeypatch.setattr("lowbit.experts.device_of", lambda linear: places[id(linear)])
    assert experts.why_not_stackable() == "experts on several devices, ['cuda:0', 'cuda:1']"
    assert not experts.repack().stacked


def test_experts_packed_later_join_the_stacks() -> None:
    experts = packed_experts([None, W4])
    routed = routing(40)
    assert experts.repack().stacked and {unit.alone for unit in experts._units.values()} == {(0, 2, 4)}
    for expert in (experts[0], experts[2], experts[4]):
        for name, linear in list(expert.named_children()):
            setattr(expert, name, packed_linear_of(linear, QuantSpec(8, -1), torch.float32))
    expected = experts(*routed)
    assert experts.repack().stacked and not any(unit.alone for unit in experts._units.values())
    assert len(experts._stacks) == 4
    assert_close(experts(*routed), expected, **tolerance(torch.float32, 4, 64))


def test_a_linear_in_a_stack_is_not_moved_or_loaded_alone() -> None:
    experts = packed_experts().repack()
    for change in (lambda m: m.half(), lambda m: m.load_state_dict(m.state_dict())):
        with pytest.raises(RuntimeError, match="the module of all experts"):
            change(experts[0].up_proj)


@pytest.mark.parametrize("spec", [W4, DYNAMIC, [W4, STATIC]], ids=["w4", "w8a8", "both"])
def test_gradients_pass_a_stack(spec: QuantSpec | list[QuantSpec | None]) -> None:
    experts = packed_experts(spec, bias=True)
    x, chosen, weights = routing()
    grads = []
    for run in (experts, experts.repack()):
        leaf, share = x.clone().requires_grad_(), weights.clone().requires_grad_()
        run(leaf, chosen, share).square().sum().backward()
        grads.append((leaf.grad, share.grad))
        del run
    for grouped, alone in zip(grads[1], grads[0], strict=True):
        assert_close(grouped, alone, **tolerance(torch.float32, 8, 64))


@pytest.mark.parametrize("spec", [W4, [W4, DYNAMIC, STATIC]], ids=["w4", "kinds"])
def test_the_module_compiles_without_a_break(spec: QuantSpec | list[QuantSpec | None]) -> None:
    experts = packed_experts(spec, bias=True, concatenated=False).repack()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for routed in (routing(), routing(17)):
        torch.testing.assert_close(compiled(*routed), experts(*routed))
