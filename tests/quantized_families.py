"""A tiny model of every family and what quantize_ made of it, and how tests compare the two."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

from lowbit import QuantLinear, QuantSpec, quantize_
from tiny_models import random_tokens, tiny_model

W4 = QuantSpec(4, 32, False)
TOKENS = random_tokens()
METHODS = ("rtn", "gptq", "awq", "awq+gptq")
WITHOUT_FOLDING = {"awq": "clip search alone", "awq+gptq": "gptq alone"}
"""What is left of a method where no scale can be folded, as the notes say it."""


@functools.cache
def quantized(family, method):
    """A family's quantized model and its report; tests only read them."""
    model = tiny_model(family)
    return model, quantize_(model, W4, method, calibration=TOKENS)


@functools.cache
def original(family):
    return tiny_model(family)


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def dense_twin(model):
    """The model with an nn.Linear holding the dequantized weight in the place of every QuantLinear."""
    twin = copy.deepcopy(model)
    for name, module in packed(twin).items():
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        linear.weight.data, linear.bias = module.dequantize(), module.bias
        twin.set_submodule(name, linear)
    return twin


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def distance(a, b):
    return float((a - b).double().norm() / b.double().norm())
