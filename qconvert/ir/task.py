"""Task: what a model takes and gives, and how that is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qconvert.vocabulary import Metric

TaskName = Literal["causal-lm", "seq2seq-lm", "encoder", "module"]


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of model. All that is known of it without a model is here; what is done for it alone is a function under its
    key where that is done.

    name: as report.json, compare.json and loader plugins have it.
    parts: its graphs, in the order in which they run.
    takes_text: it takes token ids and an attention mask [rows, tokens]; else whatever a module's forward takes.
    reads_source: an encoder reads a source, and the decoder's tokens are an input of their own.
    generates: it writes text, token by token: it has an output head and a cache, and the KL of its logits judges it.
    outputs: names of what its graphs may give, in this order; () for whatever tensors a module returns.
    unmeasured: metrics that verification does not measure of it.
    """

    name: TaskName
    parts: tuple[str, ...] = ("model",)
    takes_text: bool = True
    reads_source: bool = False
    generates: bool = False
    outputs: tuple[str, ...] = ()
    unmeasured: tuple[Metric, ...] = ()

    @property
    def continues_prompts(self) -> bool:
        """Whether models of the task continue a prompt: prompt and answer are one text, as for a decoder alone."""
        return self.generates and not self.reads_source


CAUSAL_LM = Task("causal-lm", generates=True, outputs=("logits",), unmeasured=("cosine",))
SEQ2SEQ_LM = Task(
    "seq2seq-lm",
    parts=("encoder", "decoder"),
    reads_source=True,
    generates=True,
    outputs=("logits",),
    unmeasured=("cosine",),
)
# An encoder gives its hidden state whatever lies above it.
ENCODER = Task(
    "encoder", outputs=("last_hidden_state", "logits", "pooler_output"), unmeasured=("kl", "kl_decode", "top1", "perplexity")
)
MODULE = Task("module", takes_text=False, unmeasured=("kl", "kl_decode", "perplexity"))

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in (CAUSAL_LM, SEQ2SEQ_LM, ENCODER, MODULE)})
