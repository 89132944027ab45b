"""QuantLinear: its tensors are the disk's whatever the memory looks like, and it computes what dequantize() says."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers import assert_close, random_quantized, tolerance
from lowbit import linear
from lowbit.affine import QuantizedWeight, dequantize
from lowbit.cpu import DISK
from lowbit.linear import QuantLinear
from lowbit.ops import CUDA_TILES
from lowbit.packing import pack_codes
from lowbit.spec import QuantSpec

N, K = 128, 192
SPECS = [
    QuantSpec(4, 64, True),
    QuantSpec(4, 32, False),
    QuantSpec(8, 64, True),
    QuantSpec(8, -1, False),
    QuantSpec(2, 32),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

by_spec = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(spec, dtype=torch.bfloat16, n=N, k=K, bias=True):
    qw = random_quantized(n, k, spec, dtype)
    return qw, QuantLinear.from_quantized(qw, torch.randn(n) if bias else None)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
        assert state[name].is_contiguous(), name


@by_spec
def test_tensors_are_named_and_shaped_as_on_disk(spec):
    qw, module = make(spec)
    state = module.state_dict()
    words, groups = K * spec.bits // 32, spec.num_groups(K)
    expected = {
        "weight_packed": ((N, words), torch.int32),
        "weight_scale": ((N, groups), torch.bfloat16),
        "weight_zero_point": ((N * spec.bits // 32, groups), torch.int32),
        "weight_shape": ((2,), torch.int64),
        "bias": ((N,), torch.bfloat16),
    }
    if spec.symmetric:
        del expected["weight_zero_point"]
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == expected
    assert state["weight_shape"].tolist() == [N, K]
    assert torch.equal(state["weight_packed"], pack_codes(qw.codes, spec.bits))
    assert not any(p.requires_grad for p in module.parameters())


@by_dtype
@by_spec
def test_forward_is_dequantize_and_matmul(spec, dtype):
    qw, module = make(spec, dtype)
    x = torch.randn(2, 3, K).to(dtype)
    expected = x.double() @ dequantize(qw, torch.float64).t() + module.bias.double()
    for m in (module, module.repack()):
        assert_close(m(x), expected, **tolerance(dtype, roundings=3, k=K))


@by_spec
def test_quantized_weight_and_dequantize_give_back_what_went_in(spec):
    qw, module = make(spec)
    for m in (module, module.repack()):
        back = m.quantized_weight()
        assert isinstance(back, QuantizedWeight) and back.spec == spec
        assert torch.equal(back.codes, qw.codes) and torch.equal(back.scales, qw.scales)
        assert (back.zeros is None) == spec.symmetric and (spec.symmetric or torch.equal(back.zeros, qw.zeros))
        assert torch.equal(m.dequantize(torch.float64), dequantize(qw, torch.float64))
        assert m.dequantize(torch.bfloat16).dtype == torch.bfloat16
        assert torch.equal(m.dequantize(torch.bfloat16), dequantize(qw, torch.float32).to(torch.bfloat16))


@pytest.fixture(params=["the CPU's layout", "the GPU's layout"])
def chosen_layout(request, monkeypatch):
    """What repack() chooses. The GPU's layout is a permutation that any device can do and undo."""
    if request.param == "the GPU's layout":
        monkeypatch.setattr(linear, "best_layout", lambda n, k, **_: CUDA_TILES)


@by_spec
def test_repacking_never_shows(spec, chosen_layout):
    """state_dict, deepcopy, pickle, load_state_dict, to: the disk layout, bit for bit, and repacked again after."""
    _, module = make(spec)
    expected, x = snapshot(module), torch.randn(3, K).to(torch.bfloat16)
    module.repack()
    layout, out = module._layout, module(x)
    assert_same_state(module.state_dict(), expected)
    assert module.repack()._layout == layout
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("cpu"))
    for other in copies:
        assert_same_state(other.state_dict(), expected)
        assert other._layout == layout and torch.equal(other(x), out)
    for assign in (False, True):
        module.load_state_dict(expected, assign=assign)
        assert_same_state(module.state_dict(), expected)
        assert module._layout == layout and torch.equal(module(x), out)


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (17, 130), (40, 300)], ids=str)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.group_size == -1] + [QuantSpec(4, -1, True), QuantSpec(2, -1)],
                         ids=QuantSpec.label)  # fmt: skip
def test_the_gpus_layout_takes_any_shape(spec, shape, monkeypatch):
    monkeypatch.setattr(linear, "best_layout", lambda n, k, **_: CUDA_TILES)
    n, k = shape
    qw, module = make(spec, n=n, k=k)
    expected, x = snapshot(module), torch.randn(2, k).to(torch.bfloat16)
    assert module.repack()._layout == CUDA_TILES and module.weight_packed.ndim == 4
    assert_same_state(module.state_dict(), expected)
    assert torch.equal(module.quantized_weight().codes, qw.codes)
    reference = x.double() @ dequantize(qw, torch.float64).t() + module.bias.double()
    assert_close(module(x), reference, **tolerance(torch.bfloat16, roundings=3, k=k))


def test_a_pickle_holds_the_disk_layout(chosen_layout):
    """Another machine's CPU may know another int4 layout, or none."""
    _, module = make(QuantSpec(4, 64, False))
    expected = snapshot(module)
    state = module.repack().__getstate__()
    assert state["_layout"] == DISK
    assert all(torch.equal(state["_parameters"][name], tensor) for name, tensor in expected.items())


@by_spec
def test_loads_onto_meta(spec):
    _, module = make(spec)
    expected = snapshot(module)
    empty = QuantLinear(K, N, spec, bias=True, dtype=torch.bfloat16, device="meta")
    assert all(p.device.type == "meta" for p in empty.parameters())
    assert empty.repack()._layout == DISK
    empty.load_state_dict(expected, assign=True)
    assert_same_state(empty.state_dict(), expected)
    x = torch.randn(2, K).to(torch.bfloat16)
    assert torch.equal(empty(x), module(x))


@by_spec
def test_dtype_conversions_reach_scales_and_bias_only(spec):
    _, module = make(spec)
    packed = module.weight_packed.clone()
    module.repack().to(torch.float32)
    assert module.weight_scale.dtype == module.bias.dtype == torch.float32
    assert module._layout == DISK and torch.equal(module.weight_packed, packed)
    module.half()
    assert module.weight_scale.dtype == module.bias.dtype == torch.float16 and module.weight_packed.dtype == torch.int32


@pytest.mark.parametrize("spec", [s for s in SPECS if s.bits != 2], ids=QuantSpec.label)
def test_memory_stays_within_five_percent_of_the_file(spec):
    _, module = make(spec, n=512, k=512, bias=False)
    on_disk = sum(t.nbytes for t in module.state_dict().values())
    module.repack()
    in_memory = sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())
    assert in_memory <= 1.05 * on_disk


def test_w4_g128_symmetric_takes_four_and_a_half_quarters_bits():
    """At most 4.25 bits per weight counting scales: 4 + 16 / 128 = 4.125."""
    _, module = make(QuantSpec(4, 128, True), n=64, k=1024, bias=False)
    state = module.state_dict()
    assert 8 * (state["weight_packed"].nbytes + state["weight_scale"].nbytes) / (64 * 1024) == 4.125


def test_odd_shapes_stay_in_the_disk_layout_and_work():
    for n, k, spec in (
        (7, 13, QuantSpec(4, -1, False)),
        (1, 1, QuantSpec(8, -1, True)),
        (33, 32, QuantSpec(2, 32, False)),
    ):
        qw, module = make(spec, n=n, k=k)
        expected, x = snapshot(module), torch.randn(2, k).to(torch.bfloat16)
        out = module.repack()(x)
        assert_same_state(module.state_dict(), expected)
        reference = x.double() @ dequantize(qw, torch.float64).t() + module.bias.double()
        assert_close(out, reference, **tolerance(torch.bfloat16, roundings=3, k=k))


# torch itself warns while importing its compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("spec", [QuantSpec(4, 64, False), QuantSpec(2, 32)], ids=QuantSpec.label)
def test_compiles_without_a_graph_break(spec, device):
    torch.compiler.reset()
    module = nn.Sequential(make(spec)[1].to(device), nn.GELU()).eval()
    module[0].repack()
    compiled = torch.compile(module, fullgraph=True)
    for tokens in (1, 5, 6):
        x = torch.randn(tokens, K, device=device).to(torch.bfloat16)
        with torch.no_grad():
            assert_close(compiled(x), module(x), **tolerance(torch.bfloat16, roundings=2))
    x = torch.randn(2, K, device=device, dtype=torch.bfloat16, requires_grad=True)
    grads = [torch.autograd.grad(run(x).sum(), x)[0] for run in (compiled, module)]
    assert_close(grads[0], grads[1], **tolerance(torch.bfloat16, roundings=3, k=N))


def test_to_device_and_back(device):
    _, module = make(QuantSpec(4, 64, False))
    expected, x = snapshot(module), torch.randn(3, K).to(torch.bfloat16)
    out = module.repack()(x)
    moved = module.to(device)
    assert_close(moved(x.to(device)), out.float(), **tolerance(torch.bfloat16, roundings=3, k=K))
    assert_same_state(moved.cpu().state_dict(), expected)


def test_repr_says_what_it_is():
    _, module = make(QuantSpec(4, 64, True), n=65)
    assert repr(module) == "QuantLinear(in_features=192, out_features=65, bias=True, w4g64sym, bfloat16)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": QuantSpec(3, 64)}, r"packed widths are \(2, 4, 8\) bits"),
        ({"spec": QuantSpec(4, 128)}, "group_size 128 does not divide K = 192"),
        ({"in_features": 0}, "at least 1, got 0 and 128"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_bad_constructions_are_named(change, message):
    good = {"in_features": K, "out_features": N, "spec": QuantSpec(4, 64), "bias": False, "dtype": torch.float32}
    QuantLinear(**good)
    with pytest.raises(ValueError, match=message):
        QuantLinear(**{**good, **change})


def test_bad_inputs_are_named():
    qw, module = make(QuantSpec(4, -1, False), n=8, k=13)
    with pytest.raises(ValueError, match=r"x must be \(..., 13\), got \(2, 14\)"):
        module(torch.zeros(2, 14))  # 14 codes fill as many words as 13
    with pytest.raises(ValueError, match=r"bias must be \(8,\), got \(9,\)"):
        QuantLinear.from_quantized(qw, torch.zeros(9))
