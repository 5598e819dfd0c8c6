"""A language model in float, quantized after training, and trained with int4 on a text: perplexity of the rest of that text.

    python examples/train_text.py smollm2 text.txt out/smollm2 --steps 60

The Trainer of transformers trains every weight, and knows nothing of quantization. Nine tenths of the text are learned; the
last tenth is what the artifacts are judged by.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from qconvert import Recipe, Report, convert, prepare_qat

LENGTH = 128


def windows(folder: Path, text: str) -> list[dict[str, Tensor]]:
    """Return consecutive pieces of a text, LENGTH tokens each, as the Trainer takes them."""
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder).encode(text))
    pieces = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def recipe(folder: Path, output: Path, scheme: str, rest: Path) -> Recipe:
    """Return the recipe of one artifact, which is judged by the rest of the text."""
    return Recipe.from_settings(
        {
            "model": str(folder),
            "output": output,
            "scheme": scheme,
            "calibration": {"source": str(rest), "samples": 4, "length": LENGTH},
            "evaluation": {"source": str(rest), "samples": 4, "length": LENGTH},
            "force": True,
        }
    )


def compare(folder: Path, text: Path, output: Path, scheme: str, steps: int, rate: float) -> tuple[Report, Report]:
    """Return the reports on what is quantized after training, and on what is trained with the scheme."""
    written = text.read_text(encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    rest = output / "rest.txt"
    rest.write_text(written[len(written) * 9 // 10 :], encoding="utf-8")
    after = convert(recipe(folder, output / "after", scheme, rest))

    trained_recipe = recipe(folder, output / "trained", scheme, rest)
    model = prepare_qat(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), trained_recipe)
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=rate,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model, arguments, train_dataset=windows(folder, written[: len(written) * 9 // 10])).train()
    return after, convert(trained_recipe, module=model.eval())


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--scheme", default="int4-g32")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2e-5)
    given = parser.parse_args()
    after, trained = compare(given.model, given.text, given.output, given.scheme, given.steps, given.rate)
    print(f"float                   perplexity {after.fidelity[0].perplexity_float:8.3f}")
    for name, report in {"after training": after, "trained with it": trained}.items():
        print(f"{given.scheme}, {name:15} perplexity {report.fidelity[0].perplexity:8.3f}, {report.size.weights_bytes} bytes")


if __name__ == "__main__":
    main()
