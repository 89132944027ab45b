"""Whatever modes and defaults of torch a caller works in, the same bytes are written and the same numbers computed."""

import threading
from contextlib import contextmanager

import pytest
import torch

import lowbit
from helpers import random_quantized
from lowbit import QuantLinear, QuantSpec
from lowbit.modes import own_modes
from tiny_models import random_tokens, tiny_folder, tiny_model


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),  # the one other device that every machine has
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
METHODS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "int8": {"method": "gptq", "bits": 8, "activations": "int8-static", "smooth": 0.5},
}
TEXT = "The tide came in over the flats, and with it came the boats, one after the other. " * 40


def modes_now():
    return (
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(), torch.get_default_device(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, a text, and what is made of them where nobody has set a mode."""
    root = tmp_path_factory.mktemp("modes")
    (root / "text.txt").write_text(TEXT)
    tiny_folder(root / "model")
    for name, options in METHODS.items():
        quantized(root, root / name, options)
    return root


def quantized(root, out, options):
    calibration = {"calibration": root / "text.txt", "samples": 4, "seq_len": 32}
    size = {} if "activations" in options else {"group_size": 32}
    return lowbit.quantize(root / "model", out, device="cpu", verbose=False, **calibration, **size, **options)


@every_mode
@pytest.mark.parametrize("method", METHODS)
def test_quantize_writes_the_same_bytes(made, tmp_path, mode, method):
    with mode():
        before = modes_now()
        quantized(made, tmp_path / "out", METHODS[method])
        assert modes_now() == before
    assert (tmp_path / "out/model.safetensors").read_bytes() == (made / method / "model.safetensors").read_bytes()


@every_mode
def test_what_reads_folders_reads_the_same(made, tmp_path, mode):
    lowbit.convert(made / "gptq", tmp_path / "expected", "gptq", dtype="float16", verbose=False)
    with mode():
        lowbit.convert(made / "gptq", tmp_path / "out", "gptq", dtype="float16", verbose=False)
        report = lowbit.inspect(made / "gptq")
        loaded, _ = lowbit.load(tmp_path / "out", device="cpu")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    assert report == lowbit.inspect(made / "gptq")
    expected, _ = lowbit.load(tmp_path / "expected", device="cpu")
    tokens = random_tokens(2)
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=0, atol=0)


@every_mode
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("m", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_layer_computes_the_same(mode, bits, m, dtype):
    """Few rows and many take different ways; both unpack weights to float32."""
    spec = QuantSpec(bits, 64, symmetric=bits != 2)
    weight = random_quantized(256, 256, spec, dtype=dtype)
    x = torch.randn(m, 256, dtype=dtype)

    def computed():
        layer = QuantLinear.from_quantized(weight)
        layer.repack()
        return layer(x)

    with torch.no_grad():
        expected = computed()
        with mode():
            found = computed()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_made_in_inference_mode():
    """They can be replaced and not changed; calibration, and weights that stay unpacked, change them."""
    spec, tokens = QuantSpec(4, 32), random_tokens()
    with torch.inference_mode():
        model = tiny_model("llama")
        before = model(tokens).logits
        with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight was made under torch\.inference_mode"):
            lowbit.quantize_(model, spec, "awq", calibration=tokens)
        with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
            lowbit.quantize_(model, spec, packed=False)
        assert torch.equal(model(tokens).logits, before)
        report = lowbit.quantize_(model, spec)
    assert len(report.layers) == 14 and isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


@pytest.mark.parametrize("callers", [torch.float32, torch.float64], ids=str)
def test_threads_do_not_take_each_others_default_dtype_for_the_callers(callers):
    """As two that load at once: transformers has the model's dtype as the default while it makes one."""
    entered, left = threading.Event(), threading.Event()
    found = []

    def second():
        with own_modes():
            entered.set()
            assert left.wait(60)
        found.append(torch.get_default_dtype())

    with default_dtype(callers):
        with own_modes():
            assert torch.get_default_dtype() == torch.float32
            with default_dtype(torch.bfloat16):
                thread = threading.Thread(target=second)
                thread.start()
                assert entered.wait(60)
        left.set()
        thread.join()
        assert found == [callers] and torch.get_default_dtype() == callers
