"""A budget on the loss of MTCNN's three networks: what is lost with everything static, and under the budget.

pip install --no-deps facenet-pytorch && pytest -n 0 tests/bench/test_mtcnn.py --bench-models DIR -s
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from qconvert.ir.artifact import GRAPH
from qconvert.ir.report import Report
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

SCHEME, BUDGET, LIMIT = "int8-channel-a8-static", "cosine>=0.999", 0.999
# Pixels that each network is given; PNet takes any number from 12 on.
SIZES = {"PNet": 60, "RNet": 24, "ONet": 48}


def crops(size: int, count: int, seed: int) -> Tensor:
    """Random squares of scikit-learn's two photographs, resized and normalized as MTCNN does: [count, 3, size, size]."""
    photographs = [torch.from_numpy(each.copy()).permute(2, 0, 1).float() for each in load_sample_images().images]
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        photograph, side = photographs[number % 2], int(generator.integers(size, 300))
        top, left = (generator.integers(0, edge - side) for edge in photograph.shape[1:])
        square = photograph[None, :, top : top + side, left : left + side]
        found.append(nn.functional.interpolate(square, size=(size, size), mode="area")[0])
    return (torch.stack(found) - 127.5) / 128


def network(name: str) -> nn.Module:
    """A network of facenet-pytorch with its weights, without the package's other requirements."""
    spec = PathFinder.find_spec("facenet_pytorch")
    assert spec is not None
    assert spec.origin is not None
    package = ModuleType("facenet_pytorch")
    package.__path__ = [str(Path(spec.origin).parent)]
    detection = ModuleType("facenet_pytorch.models.utils.detect_face")  # what finds faces with the networks wants torchvision
    detection.detect_face = detection.extract_face = None  # type: ignore[attr-defined]
    sys.modules |= {"facenet_pytorch": package, detection.__name__: detection}
    made: nn.Module = getattr(import_module("facenet_pytorch.models.mtcnn"), name)()
    return made.eval()


def pnet() -> tuple[nn.Module, Tensor]:
    return network("PNet"), crops(SIZES["PNet"], 160, seed=0)


def rnet() -> tuple[nn.Module, Tensor]:
    return network("RNet"), crops(SIZES["RNet"], 160, seed=0)


def onet() -> tuple[nn.Module, Tensor]:
    return network("ONet"), crops(SIZES["ONet"], 160, seed=0)


def least_cosine(folder: Path, made: nn.Module, x: Tensor) -> float:
    """Of all outputs, the mean over the rows of x."""
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    pairs = [(torch.from_numpy(a).flatten(1), b.detach().flatten(1)) for a, b in zip(found, made(x), strict=True)]
    return min(float(torch.cosine_similarity(a.double(), b.double()).mean()) for a, b in pairs)


@contextmanager
def counted(made: nn.Module) -> Iterator[dict[str, int]]:
    """Products of numbers that each layer takes for what is run within the context."""
    products: dict[str, int] = {}

    def count(name: str, weight: Tensor) -> Any:
        return lambda module, args, output: products.update({name: output.numel() * weight[0].numel()})

    layers = [(name, each) for name, each in made.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    hooks = [each.register_forward_hook(count(name, each.weight)) for name, each in layers]
    yield products
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("quantizer", ["per-channel", "auto"])
@pytest.mark.parametrize("name", SIZES)
def test_all_outputs_keep_the_budget(name: str, quantizer: str, tmp_path: Path) -> None:
    if PathFinder.find_spec("facenet_pytorch") is None:
        pytest.skip("needs facenet-pytorch")
    samples = {"calibration": {"samples": 96}}
    settings = {"model": f"module:{__file__}:{name.lower()}", "scheme": SCHEME, "verify": False, **samples}

    def converted(output: Path, **own: Any) -> Report:
        return convert(Recipe.from_settings({**settings, "output": str(output), **own}))

    converted(tmp_path / "every", quantizer={"auto": "gptq"}.get(quantizer, quantizer))
    report = converted(tmp_path / "some", quantizer=quantizer, budget=BUDGET)
    made, x = network(name), crops(SIZES[name], 64, seed=7)
    every, some = (least_cosine(tmp_path / folder, made, x) for folder in ("every", "some"))
    with counted(made) as products, torch.no_grad():
        made(x[:1])
    share = sum(products[layer.name] for layer in report.layers) / sum(products.values())
    kept = [each.name for each in report.kept_float if "budget" in each.reason]
    print(f"| {name} | {quantizer} | {every:.5f} | {some:.5f} | {share:.0%} | {', '.join(kept)} |")
    assert some >= LIMIT
