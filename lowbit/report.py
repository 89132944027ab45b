"""What a quantization run did, weight by weight: what is printed, and what is kept in ``lowbit.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .spec import QuantSpec

__all__ = ["LayerRecord", "QuantReport", "SkippedWeight"]


@dataclass(frozen=True)
class LayerRecord:
    """One quantized weight.

    Attributes:
        name: module name in the model.
        shape: (N, K).
        spec: its grid.
        method: what was kept: ``gptq``, ``awq``, ``rtn``, ...
        loss: ``E|Q x - W x|^2 / E|W x|^2`` over the calibration tokens; without calibration
            ``|Q - W|^2 / |W|^2``, see ``loss_of``.
        rtn_loss: the same for round to nearest on the searched grid.
        loss_of: ``outputs`` or ``weights``.
        damp_frac: damping of the Hessian that was used, None where none was.
        notes: everything that did not go the usual way.
    """

    name: str
    shape: tuple[int, int]
    spec: QuantSpec
    method: str
    loss: float
    rtn_loss: float
    loss_of: str
    damp_frac: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict of the fields."""
        return {**asdict(self), "shape": list(self.shape), "notes": list(self.notes)}


@dataclass(frozen=True)
class SkippedWeight:
    """A weight matrix that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict of the fields."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass
class QuantReport:
    """The whole run.

    Attributes:
        model: what was quantized, as it was named.
        out: folder written, None for a model quantized in place.
        method, spec: as asked for.
        coverage: share of the decoder blocks' weight elements that were quantized.
        layers, skipped: one record per weight matrix of the model.
        calibration: source, sha256, windows, seq_len, tokens; None when no data was used.
        base_bytes, packed_bytes: the whole model's tensors before and after.
        linear_bits: stored bits per quantized weight, counting scales and zeros.
        seconds: wall time, by part.
        notes: what concerns the run as a whole.
    """

    model: str
    method: str
    spec: QuantSpec
    coverage: float
    layers: list[LayerRecord] = field(default_factory=list)
    skipped: list[SkippedWeight] = field(default_factory=list)
    out: str | None = None
    calibration: dict[str, Any] | None = None
    base_bytes: int = 0
    packed_bytes: int = 0
    linear_bits: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict: the record of ``lowbit.json``."""
        return {
            "model": self.model,
            "out": self.out,
            "method": self.method,
            "spec": self.spec.to_dict(),
            "coverage": self.coverage,
            "calibration": self.calibration,
            "base_bytes": self.base_bytes,
            "packed_bytes": self.packed_bytes,
            "linear_bits": self.linear_bits,
            "seconds": {part: round(value, 3) for part, value in self.seconds.items()},
            "notes": list(self.notes),
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [weight.to_dict() for weight in self.skipped],
        }

    def summary(self) -> str:
        """A few lines for people: sizes, coverage, the worst layers, and everything unusual."""
        lines = [f"{self.model}: {self.spec.label()} by {self.method}, {len(self.layers)} weights"]
        if self.packed_bytes:
            ratio = self.base_bytes / self.packed_bytes
            lines.append(
                f"  size        {_mb(self.base_bytes)} -> {_mb(self.packed_bytes)} ({ratio:.2f}x smaller), "
                f"{self.linear_bits:.3f} bits per quantized weight"
            )
        lines.append(f"  coverage    {self.coverage:.1%} of the decoder's weights")
        if self.calibration:
            c = self.calibration
            lines.append(f"  calibration {c['windows']} x {c['seq_len']} tokens of {c['source']}")
        if self.layers:
            kind = "outputs" if any(layer.loss_of == "outputs" for layer in self.layers) else "weights"
            measured = [layer for layer in self.layers if layer.loss_of == kind]
            worst = max(measured, key=lambda layer: layer.loss)
            mean = sum(layer.loss for layer in measured) / len(measured)
            lines.append(
                f"  error       relative squared error of the {kind}: mean {mean:.2e}, "
                f"worst {worst.loss:.2e} ({worst.name})"
            )
        if self.seconds:
            parts = ", ".join(f"{part} {value:.1f} s" for part, value in self.seconds.items())
            lines.append(f"  time        {parts}")
        lines += [f"  left dense  {weight.name} {list(weight.shape)}: {weight.reason}" for weight in self.skipped]
        lines += [f"  note        {note}" for note in self.notes]
        lines += [f"  note        {layer.name}: {note}" for layer in self.layers for note in layer.notes]
        if self.out:
            lines.append(f"  written     {self.out}")
        return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
