"""What training has made of a module, in a file that a conversion takes it from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from qconvert.errors import InputError, UsageError
from qconvert.execution.modules import as_matrix
from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.finite import all_finite, not_finite
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.trained import TrainedLayer
from qconvert.storage.trained import write_trained
from qconvert.training.inputs import StaticInput
from qconvert.training.layers import FakeQuantized, QATEmbedding


def save_trained(module: nn.Module, path: Path) -> None:
    """Write what training has made of a module that `prepare_qat` gave: a recipe takes the file as `trained`.

    It holds the codes that a forward computes with, their scales, and the floats beside them.

    Raises UsageError QC-TRAIN-001 for a module without layers that were prepared, QC-TRAIN-005 for a static range that no batch
    has set; InputError QC-WEIGHT-001 or QC-FLOAT-001 for what is not finite; ResourceError (disk).
    """
    layers: dict[str, tuple[QuantizedTensor, TrainedLayer]] = {}
    for name, layer in _quantized_layers(module).items():
        weight = as_matrix(layer)
        if not all_finite(weight):
            raise not_finite(f"is in {name}.weight after training")
        assert isinstance(layer, FakeQuantized)
        quantized = layer.weight_quantizer.quantized(weight)
        layers[name] = quantized, TrainedLayer(layer.scheme, _input_codes(name, layer.input_quantizer))
    if not layers:
        raise UsageError(
            "QC-TRAIN-001", "no layer of the module was prepared", hint="call prepare_qat before training, and give that module"
        )
    write_trained(Path(path), layers, _floats(module))


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


def _floats(module: nn.Module) -> dict[str, Tensor]:
    """All other parameters and floating buffers that a checkpoint has, each once."""
    seen: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, FakeQuantized):
            assert isinstance(layer, nn.Module)
            parts = [layer.weight_quantizer, layer.input_quantizer]
            seen |= {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
            seen.add(id(layer.get_parameter("weight")))
    floats: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            floats[name] = tensor
    return floats
