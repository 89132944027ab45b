"""What a run with quantized activations may be asked for. Without torch, so that the command line answers at once."""

from __future__ import annotations

from .spec import ActivationSpec, QuantSpec

__all__ = ["ACTIVATIONS", "METHODS", "build_spec", "check_request", "needs_ranges", "needs_text"]

ACTIVATIONS = ("int8", "int8-static")
"""Names of the activation schemes: one scale per token, found as it comes; one per layer, found by calibration."""

METHODS = ("gptq", "rtn")
"""Methods that choose the weights' codes where activations are quantized; SmoothQuant takes the place of AWQ."""

_DEFAULT_GROUP = 128


def build_spec(
    bits: int = 4, group_size: int | None = None, symmetric: bool | None = None, activations: str | None = None
) -> QuantSpec:
    """The grid that the arguments of :func:`lowbit.quantize` mean.

    Args:
        bits, symmetric: see :class:`QuantSpec`.
        group_size: None is 128, and with quantized activations -1, the whole row.
        activations: None, or one of :data:`ACTIVATIONS`.

    Raises:
        ValueError: a value that is not allowed, or weights that do not go with quantized activations.
    """
    if activations is None:
        return QuantSpec(bits, _DEFAULT_GROUP if group_size is None else group_size, symmetric)  # type: ignore[arg-type]
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS} or None, got {activations!r}")
    weights = QuantSpec(bits, -1 if group_size is None else group_size, symmetric)  # type: ignore[arg-type]
    if (weights.bits, weights.group_size, weights.symmetric) != (8, -1, True):
        raise ValueError(
            f"activations {activations!r} go with weights of 8 bits in whole rows (bits 8, group_size -1), symmetric; "
            f"got bits {weights.bits}, group_size {weights.group_size}, "
            f"{'symmetric' if weights.symmetric else 'asymmetric'}"
        )
    return QuantSpec(8, -1, True, ActivationSpec(8, dynamic=activations == "int8"))


def needs_text(spec: QuantSpec, method: str, smooth: float | None) -> bool:
    """Whether a run cannot do without calibration data."""
    return method != "rtn" or needs_ranges(spec, smooth)


def needs_ranges(spec: QuantSpec, smooth: float | None) -> bool:
    """Whether the ranges of the layers' inputs have to be measured."""
    return smooth is not None or (spec.activations is not None and not spec.activations.dynamic)


def check_request(spec: QuantSpec, method: str, smooth: float | None, *, calibrated: bool, packed: bool) -> None:
    """Refuse what does not go together, before any work.

    Args:
        smooth: SmoothQuant's migration strength, or None.
        calibrated: whether there is calibration data.
        packed: whether linears are replaced by modules that hold integers.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if smooth is not None and spec.activations is None:
        raise ValueError(
            f"smooth {smooth!r} makes activations easier to quantize, but {spec.label()} leaves them alone; it goes "
            f"with activations {' or '.join(ACTIVATIONS)}"
        )
    if smooth is not None and (isinstance(smooth, bool) or not isinstance(smooth, (int, float)) or not 0 < smooth < 1):
        raise ValueError(f"smooth must lie between 0 and 1, both excluded (0.5 is usual), got {smooth!r}")
    if spec.activations is None:
        return
    if not spec.symmetric:
        raise ValueError(f"quantized activations go with symmetric weights, got {spec.label()}")
    if method not in METHODS:
        raise ValueError(f"with quantized activations the method must be one of {METHODS}, got {method!r}")
    if not packed:
        raise ValueError("activations are quantized by the packed module only (Int8Linear); use packed=True")
    if not calibrated and needs_ranges(spec, smooth):
        what = "smooth" if smooth is not None else "static activations"
        raise ValueError(f"{what} needs calibration tokens: the ranges of the inputs are measured on them")
