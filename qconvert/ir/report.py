"""Report: the verdict of a run and its evidence, exactly as report.json holds it (schema 1).

Every number has its unit in its name. A metric that a task has no use for is None here and absent in the JSON.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qconvert.ir.activation_ranges import ActivationRanges
from qconvert.ir.decision import Assignment, KeptFloat
from qconvert.ir.histogram import WeightHistogram
from qconvert.ir.task import TaskName

Status = Literal["passed", "failed", "not-run"]
# What every entry of report.json's "parity" has, with or without a value.
PARITY_KEYS = ("max_relative_error", "reason")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SampleCounts(_Part):
    """The numbers of samples that were drawn for each purpose."""

    calibration: int
    evaluation: int


class Size(_Part):
    """The bytes of an artifact.

    weights_bytes: every byte of tensor data that the artifact ships; ratio: weights_bytes / source_bytes.
    """

    source_bytes: int
    weights_bytes: int
    graph_bytes: int
    ratio: float
    average_bits: float


class Parity(_Part):
    """The artifact against its own dequantized weights. target: a provider, or "transformers" for the loader
    check, "float" for the float graph, which is what fidelity and latency compare with, against torch.

    cosine, kl (in nats): for targets that compute in half the width, which a relative error can't judge.
    pieces: of graphs whose weights are too large to be held in float32 at once, into how many pieces they were divided, that
        were run one after the other.
    """

    target: str
    status: Status
    max_relative_error: float | None = None
    cosine: float | None = None
    kl: float | None = None
    pieces: int | None = None
    reason: str | None = None


class Fidelity(_Part):
    """The artifact against the float model, on the evaluation windows or samples.

    kl in nats, of windows that are read at once; kl_decode of the same, token by token: another number where an artifact has a
    body of its own for prompts. perplexity over the windows; top1 the share of positions (or rows) with the same most likely
    answer; cosine the mean over samples.
    """

    target: str
    status: Status
    kl: float | None = None
    kl_decode: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    perplexity_float: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    reason: str | None = None


class Trial(_Part):
    """Session settings that were tried. ms: one run of the artifact, for decoders the prompt and the tokens after it."""

    threads: int
    spinning: bool
    ms: float


# Where other programs took more of the cores' time than this, or, if that is not known, repeats are further apart than that,
# the machine was busy.
MOST_OF_OTHERS, MOST_SPREAD = 0.1, 0.2
# With fewer repeats of either, nothing is called faster or slower than the other.
FEWEST_TO_TELL = 3


class Latency(_Part):
    """The time that one run of the artifact takes on a target, beside the float model's.

    speedup: float_p50_ms / p50_ms, both measured in one process; below 1 the artifact is slower than float. On a busy machine
        it is float_processor_ms / processor_ms, the time that the cores worked for one run.
    repeats, float_repeats, decode_repeats: how many runs, and tokens, were timed. p25 and p75 are their quartiles, of a float
        model in pieces the sum of those of the pieces. steady: whether they ended because more would have told little, and not
        because the time was over (qconvert/verify/repeats.py). timing_seconds: what all timings took together.
    float_pieces: of a float model that is too large to be run whole, into how many pieces it was divided, whose times add up;
        float_pieces_measured: how many of them were run, the others being like one of those.

    loaded_bytes, loading_bytes: resident memory of a process that has loaded the graphs and does nothing else, and the most
        that it had meanwhile; None where the system does not tell.
    others_share: of the cores' time, what other programs took meanwhile, 0 to 1; None where the system does not tell. spread:
    how far apart the middle half of the repeats is, relative to p50_ms.
    threads, spinning: the artifact's session settings, the fastest of `trials`. accuracy_level: of its MatMulNBits, None
    without one; at 4 the CPU's kernel quantizes activations to int8.
    device_nodes, cpu_nodes, copies: of a target other than the CPU: how many nodes ran there, which ran on the CPU instead,
    and how often something was copied between the two within one run.
    """

    target: str
    status: Status
    threads: int | None = None
    spinning: bool | None = None
    accuracy_level: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    decode_p25_tokens_per_s: float | None = None
    decode_p75_tokens_per_s: float | None = None
    decode_repeats: int | None = None
    p25_ms: float | None = None
    p50_ms: float | None = None
    p75_ms: float | None = None
    p95_ms: float | None = None
    repeats: int | None = None
    float_p25_ms: float | None = None
    float_p50_ms: float | None = None
    float_p75_ms: float | None = None
    float_repeats: int | None = None
    float_pieces: int | None = None
    float_pieces_measured: int | None = None
    speedup: float | None = None
    trials: tuple[Trial, ...] | None = None
    device_nodes: int | None = None
    cpu_nodes: tuple[str, ...] | None = None
    copies: int | None = None
    processor_ms: float | None = None
    float_processor_ms: float | None = None
    spread: float | None = None
    steady: bool | None = None
    timing_seconds: float | None = None
    others_share: float | None = None
    loaded_bytes: int | None = None
    loading_bytes: int | None = None
    reason: str | None = None

    @property
    def busy(self) -> bool:
        """Whether the times on the clock say more about the machine than about the artifact."""
        if self.others_share is not None:
            return self.others_share > MOST_OF_OTHERS
        return self.spread is not None and self.spread > MOST_SPREAD

    @property
    def is_rarely_timed(self) -> bool:
        """Whether artifact or float was run too few times for its repeats to have a middle."""
        return self.repeats is not None and min(self.repeats, self.float_repeats or 0) < FEWEST_TO_TELL

    @property
    def is_clear(self) -> bool:
        """Whether times on the clock tell artifact and float apart: the middle halves of the repeats of both have nothing in
        common, and there are enough of them to have a middle.
        """
        if self.repeats is None:  # a record of before says what it says
            return True
        if self.p25_ms is None or self.p75_ms is None or self.float_p25_ms is None or self.float_p75_ms is None:
            return False
        return not self.is_rarely_timed and (self.p75_ms < self.float_p25_ms or self.float_p75_ms < self.p25_ms)


class Processor(_Part):
    """The processor that an artifact was verified on.

    name: as the system gives it; architecture: "x86_64", "aarch64", "arm64" ...

    avx512, vnni, amx (x86-64), dot_product (ARM64): whether it has them; None where the system does not say.
    signed_products: what its kernel makes of unsigned by signed bytes, tried (docs/processors.md).
    """

    name: str
    architecture: str
    signed_products: Literal["exact", "saturate"]
    avx512: bool | None = None
    vnni: bool | None = None
    amx: bool | None = None
    dot_product: bool | None = None


class CacheLoss(_Part):
    """A graph whose KV cache is in codes, against the same graph with a cache in float: evaluation samples, joined to windows
    of `context` tokens, go through both in several runs, each on the cache of those before.

    kl in nats, mean over positions; top1: share of them with the same most likely token; perplexity: over the windows.
    """

    context: int
    windows: int
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    perplexity_float_cache: float | None = None


class CacheReport(_Part):
    """A KV cache in codes.

    bytes_per_token, float_bytes_per_token: of one row, and what a cache in float would take. loss: None where nothing was run.
    """

    kind: Literal["int8"]
    bytes_per_token: int
    float_bytes_per_token: int
    loss: CacheLoss | None = None


class Evidence(_Part):
    """The measures of a verification, and the machine that they were taken on."""

    processor: Processor | None = None
    parity: tuple[Parity, ...] = ()
    fidelity: tuple[Fidelity, ...] = ()
    latency: tuple[Latency, ...] = ()
    cache_loss: CacheLoss | None = None


class GateResult(_Part):
    """A gate, the value that was measured for it (None where nothing was), and whether it was kept."""

    metric: str
    comparison: Literal["<=", ">="]
    limit: float
    value: float | None
    passed: bool


class LayerReport(_Part):
    """One quantized layer, or one tensor that was cast.

    relative_error: ||W - dequantize(q)|| / ||W||; bytes: packed codes, scales, zero points and outliers.

    outlier_share: of the layer's input columns, those kept in float beside the codes; None where there are none.
    reason: why the scheme is not the one that was asked for; None where it is.
    histogram: of the weights before and after; None for a tensor that was cast, and where too many layers have lost more
        (qconvert/ir/histogram.py).
    zeroed, largest_zeroed: of a tensor that was cast, how many values are too small for its type, so that they became 0, and
        the largest magnitude among them; None where there are none.
    """

    name: str
    scheme: str
    relative_error: float
    bytes: int
    outlier_share: float | None = None
    reason: str | None = None
    zeroed: int | None = None
    largest_zeroed: float | None = None
    histogram: WeightHistogram | None = None


class Report(_Part):
    """The report of a conversion or a verification, which report.json holds.

    passed: False where a check failed or a gate was missed, else True, or None where nothing was run.
    assignment: None where the recipe named the schemes. processor: None where nothing was run. activations: None where no
        layer has static ones.
    context_length: tokens that a decoder has positions for, prompt and answer together; None for other tasks, and where the
        model's config does not say.
    transformers_class: the class that loads the whole folder in transformers; None where nothing does.
    kv_cache: of a decoder that keeps keys and values in codes; else None.
    histograms: which layers and values have one, where not all do; else None.
    """

    passed: bool | None
    task: TaskName
    quantizer: str
    scheme: str
    samples: SampleCounts
    size: Size
    context_length: int | None = None
    transformers_class: str | None = None
    processor: Processor | None = None
    parity: tuple[Parity, ...] = ()
    fidelity: tuple[Fidelity, ...] = ()
    latency: tuple[Latency, ...] = ()
    gates: tuple[GateResult, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    kept_float: tuple[KeptFloat, ...] = ()
    assignment: Assignment | None = None
    activations: ActivationRanges | None = None
    kv_cache: CacheReport | None = None
    histograms: str | None = None

    @property
    def was_run(self) -> bool:
        """Whether the artifact itself was run, on any target: what fails its parity is not compared any further."""
        return any(part.status == "failed" for part in self.parity) or any(part.status != "not-run" for part in self.fidelity)

    @property
    def loss_is_limited(self) -> bool:
        """Whether a gate says how much may be lost against the float model."""
        return any(gate.metric in Fidelity.model_fields for gate in self.gates)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of report.json."""
        document = self.model_dump(mode="json")
        for section, always in (("parity", PARITY_KEYS), ("fidelity", ()), ("latency", ()), ("layers", ())):
            document[section] = [
                {key: value for key, value in entry.items() if value is not None or key in always}
                for entry in document[section]
            ]
        for name in ("context_length", "transformers_class", "histograms"):
            if document[name] is None:
                del document[name]
        parts = {
            "assignment": self.assignment and self.assignment.document(),
            "activations": self.activations and self.activations.document(),
            "kv_cache": self.kv_cache and self.kv_cache.model_dump(mode="json", exclude_none=True),
            "processor": self.processor and self.processor.model_dump(mode="json", exclude_none=True),
        }
        found = {name: part for name, part in parts.items() if part is not None}
        return {"schema": 1, **{name: value for name, value in document.items() if name not in parts}, **found}
