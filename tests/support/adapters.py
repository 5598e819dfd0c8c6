"""Folders of LoRA adapters, as peft saves them, and recipes that take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from qconvert import Recipe
from qconvert.errors import InputError, QConvertError
from qconvert.ir.artifact import GRAPH

FEW = {"calibration": {"samples": 8, "length": 32}, "evaluation": {"samples": 4, "length": 32}}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def recipe_of(model: str | Path, adapter: Path, output: Path, **settings: Any) -> Recipe:
    kept = {} if settings.get("merge_adapter") else {"layout": "onnx"}
    return Recipe.from_settings(
        {"model": str(model), "adapter": str(adapter), "output": str(output), **FEW, **kept, **settings}
    )


def logits(module: Any, ids: Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = module(ids).logits.numpy()
    return found


def in_onnxruntime(folder: Path, ids: Tensor) -> np.ndarray[Any, Any]:
    """The first output; of a decoder the logits of all positions, with an empty cache."""
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    fed = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    for each in session.get_inputs():
        if each.name.startswith("past"):
            fed[each.name] = np.zeros((len(ids), each.shape[1], 0, each.shape[3]), np.float32)
        elif each.name not in fed:
            fed[each.name] = np.zeros(ids.shape, np.int64)
    names = [each.name for each in session.get_inputs()]
    first: np.ndarray[Any, Any] = session.run(None, {name: fed[name] for name in names})[0]
    return first


def adapted(module: Any, folder: Path, **settings: Any) -> Any:
    """A module with random LoRA matrices that move its output, saved in `folder`; peft's model is returned."""
    torch.manual_seed(1)
    asked = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    model = get_peft_model(module, LoraConfig(**asked)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def error(code: str, run: Callable[[], object], kind: type[QConvertError] = InputError) -> str:
    with pytest.raises(kind) as raised:
        run()
    assert raised.value.code == code
    return f"{raised.value.message} {raised.value.hint}"
