"""What is asked for cannot be had: refused before any work."""

from __future__ import annotations

import pytest
import torch

from refusals import CALIBRATED, TEXT, arguments
from tiny_models import tiny_folder


@pytest.mark.parametrize("bits", ["0", "1", "7", "16", "-4"])
def test_unknown_bits(refused, model, out, bits):
    message = refused(arguments(model, out, "--bits", bits))
    assert message == f"bits must be one of (2, 3, 4, 5, 6, 8), got {bits}"


@pytest.mark.parametrize("bits", ["3", "5", "6"])
def test_bits_without_a_file_format(refused, model, out, bits):
    message = refused(arguments(model, out, "--bits", bits, *CALIBRATED))
    assert message.startswith(f"{bits}-bit weights have no packed form (packed widths: (2, 4, 8))")


def test_an_unknown_group_size(refused, model, out):
    message = refused(arguments(model, out, "--group-size", "48"))
    assert message == "group_size must be one of (32, 64, 128, -1) (-1 is the whole row), got 48"


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_group_size_that_does_not_divide(refused, model, out, method):
    options = ["--method", method, "--calibration", TEXT, "--samples", "2", "--seq-len", "32"]
    message = refused(arguments(model, out, *options, "--group-size", "128"))
    assert "model.layers.0.self_attn.q_proj: group_size 128 does not divide K = 64" in message
    assert "group sizes that would work: [32, 64, -1]" in message


def test_sizes_that_fit_some_layers_only(refused, tmp_path, out):
    model = tiny_folder(tmp_path / "narrow", hidden=96)
    message = refused(arguments(model, out, "--method", "rtn", "--group-size", "64"))
    assert "K = 96; group sizes that would work: [32, -1]" in message
    assert "down_proj" not in message, "K = 128 is fine there"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--seq-len", "1"], "seq_len must be at least 2 tokens, got 1"),
        (["--ignore", "(q_proj"], "ignore '(q_proj' is not a regular expression: missing )"),
        (["--ignore", "nothing_of_the_kind"], "ignore 'nothing_of_the_kind' matches no weight of the model"),
        (["--ignore", "mlp"], "only 40.0% of the decoder's weights would be quantized, at least 90% is expected"),
        (["--dtype", "float8"], "dtype must be auto, float32, float16, bfloat16, got 'float8'"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_options_out_of_range(refused, model, out, options, complaint):
    assert refused(arguments(model, out, *CALIBRATED, *options)).startswith(complaint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(refused, model, out, device):
    message = refused(arguments(model, out, *CALIBRATED, "--device", device))
    assert message == f"device '{device}' was asked for, but torch sees 0 CUDA devices"
