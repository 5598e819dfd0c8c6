"""llm-compressor's AWQ on the windows of a benchmark, in a Python that has it: python peer_awq.py MODEL WINDOWS.npz SCHEME

WINDOWS.npz: calibration and evaluation, [rows, tokens] token ids. SCHEME: asym or sym, int4 in groups of 32, the head in
float. Prints the seconds that it took, after the model was loaded, and its KL to the float model.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM

# Without an accelerator pinning raises, and AWQ pins all that it caches.
torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(2)
    windows = np.load(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    evaluation = torch.from_numpy(windows["evaluation"])
    before = log_probabilities(model, evaluation)
    calibration = windows["calibration"].tolist()
    data = Dataset.from_dict({"input_ids": calibration, "attention_mask": [[1] * len(row) for row in calibration]})
    weights = {"num_bits": 4, "type": "int", "symmetric": sys.argv[3] == "sym", "strategy": "group", "group_size": 32}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=[AWQModifier(), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])],
        max_seq_length=len(calibration[0]),
        num_calibration_samples=len(calibration),
    )
    seconds = time.perf_counter() - start
    after = log_probabilities(model, evaluation)
    losses = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
    print(json.dumps({"seconds": seconds, "kl": sum(losses) / len(losses)}))


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    return [model(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1) for row in windows]


if __name__ == "__main__":
    main()
