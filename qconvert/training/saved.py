"""What training has made of a module, in a file that a conversion takes it from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from qconvert.errors import InputError, UsageError
from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.finite import all_finite, not_finite
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.trained import TrainedLayer
from qconvert.storage.trained import write_trained
from qconvert.training.inputs import StaticInput
from qconvert.training.layers import FakeQuantized, QATEmbedding, as_matrix


def save(module: nn.Module, path: Path) -> None:
    """Write the codes that a forward of a prepared module computes with, their scales, and its floats.

    Raises UsageError QC-TRAIN-001 for a module without layers that were prepared, QC-TRAIN-005 for a static range that no batch
    has set; InputError QC-WEIGHT-001 or QC-FLOAT-001 for what is not finite; ResourceError (disk).
    """
    layers: dict[str, tuple[QuantizedTensor, TrainedLayer]] = {}
    taken: set[str] = set()
    for name, layer in _quantized_layers(module).items():
        weight = as_matrix(layer)
        if not all_finite(weight):
            raise not_finite(f"is in {name}.weight after training")
        assert isinstance(layer, FakeQuantized)
        quantized = layer.weight_quantizer.quantized(weight)
        layers[name] = quantized, TrainedLayer(layer.scheme, _input_codes(name, layer.input_quantizer))
        taken.add(f"{name}.weight")
    if not layers:
        raise UsageError(
            "QC-TRAIN-001", "no layer of the module was prepared", hint="call prepare_qat before training, and give that module"
        )
    write_trained(Path(path), layers, _floats(module, taken))


def _quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with a weight of their own, by name; of an embedding and the head that shares its weight, the embedding."""
    by_weight: dict[int, tuple[str, nn.Module]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, FakeQuantized):
            assert isinstance(layer, nn.Module)
            key = id(layer.weight_quantizer)
            if key not in by_weight or isinstance(layer, QATEmbedding):
                by_weight[key] = name, layer
    return dict(by_weight.values())


def _input_codes(name: str, quantizer: nn.Module) -> ActivationCodes | None:
    if not isinstance(quantizer, StaticInput):
        return None
    if not quantizer.was_seen:
        raise UsageError(
            "QC-TRAIN-005",
            f"no batch has set the range of what {name} reads",
            hint="train, or run some batches in training mode, before you convert",
        )
    codes = quantizer.codes
    if not (codes.low > float("-inf") and codes.high < float("inf")):
        raise InputError(
            "QC-FLOAT-001", f"the range of what {name} reads is not finite", hint="look for what diverged in training"
        )
    return codes


def _floats(module: nn.Module, taken: set[str]) -> dict[str, Tensor]:
    """All other parameters and floating buffers that a checkpoint has, each once."""
    own = tuple(f"{name}." for name, each in module.named_modules() if isinstance(each, FakeQuantized))
    own = tuple(f"{prefix}{part}_quantizer." for prefix in own for part in ("weight", "input"))
    quantized = {id(layer.get_parameter("weight")) for layer in _quantized_layers(module).values()}
    kept = module.state_dict(keep_vars=True)
    floats: dict[str, Tensor] = {}
    seen = set(quantized)
    for name, tensor in kept.items():
        if name in taken or name.startswith(own) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if id(tensor) not in seen:
            seen.add(id(tensor))
            floats[name] = tensor
    return floats
