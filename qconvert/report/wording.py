"""The words and numbers that the views share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qconvert.errors import printable
from qconvert.ir.activation_ranges import ActivationRanges
from qconvert.ir.decision import Assignment, KeptFloat
from qconvert.ir.report import CacheReport, Fidelity, GateResult, Latency, LayerReport, Parity, Processor, Report, Trial
from qconvert.ir.scheme import QuantScheme, parse_scheme
from qconvert.vocabulary import CAST

if TYPE_CHECKING:
    from qconvert.ir.plan import LayerPlan

WORST_LAYERS = 5


def byte_size(count: int) -> str:
    """Word a number of bytes, 1234567 as "1.2 MB": decimal units, as disks and downloads count."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:  # what would round to 1000.0
        value /= 1000
        del units[0]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def verdict(report: Report) -> str:
    """Word the verdict in a line that claims no more than was shown: without gates nobody has said how much may be lost."""
    missed = sum(not gate.passed for gate in report.gates)
    gates = f"{missed or len(report.gates)} of {len(report.gates)} gates {'missed' if missed else 'kept'}"
    not_run = [part.target for part in report.parity if part.status == "not-run"]
    if report.passed is None:
        return f"not verified; {gates}" if report.gates else "not verified"
    if not report.passed:
        said = [f"failed: {gates}" if missed else "failed"]
    elif report.gates:
        said = [f"passed: {gates}"] + ([] if report.loss_is_limited else ["none limits what is lost"])
    else:
        said = ["computes what its weights say", "no limits set"]
    if not report.passed and not report.was_run:
        said.append("not verified")
    elif not_run:
        said.append(f"not run on {' and '.join(not_run)}")
    return "; ".join(said)


def status(part: Parity | Fidelity | Latency) -> str:
    """Word the status of a check.

    Parity has a limit of its own; what is lost, and how fast it is, are measured, and left to gates to judge.
    """
    return "measured" if part.status == "passed" and not isinstance(part, Parity) else part.status


def piece(report: Report) -> str:
    """Return the word for what `report.layers` holds."""
    return "tensor" if report.quantizer == CAST else "layer"


def size(report: Report) -> str:
    """Word the size: weights, their ratio to the source's, bits per quantized weight, and graphs."""
    part = report.size
    weight = "weight" if report.quantizer == CAST else "quantized weight"
    return (
        f"{byte_size(part.weights_bytes)} of weights, {part.ratio:.3g} x the source's {byte_size(part.source_bytes)}; "
        f"{part.average_bits:.3g} bits per {weight}; graphs {byte_size(part.graph_bytes)}"
    )


def assignment(part: Assignment, measured: Iterable[Fidelity] = ()) -> str:
    """Word what a budget decided, and whether it lost what was predicted. measured: where it was run."""
    predicted = _number("predicted KL ", part.predicted_kl, ".3g", " nats") or _number(
        "predicted relative error of the output ", part.predicted_error, ".3g"
    )
    if part.limits_loss:
        return _kept_within(part, measured)
    found = [_number("measured ", each.kl, ".3g", f" nats on {each.target}") for each in measured]
    return _measured(None, f"{part.average_bits:.4g} bits per quantized weight for the budget {part.budget}", predicted, *found)


def _kept_within(part: Assignment, measured: Iterable[Fidelity]) -> str:
    """Word how many layers stay in float for a budget on the loss, and what was measured."""
    in_float, every = part.schemes.get("float", 0), sum(part.schemes.values())
    found = [_number("measured ", each.kl or each.cosine, ".5g", f" on {each.target}") for each in measured]
    predicted = _number("predicted KL ", part.predicted_kl, ".3g", " nats") or _number(
        "predicted cosine ", part.predicted_cosine, ".5f"
    )
    return _measured(None, f"{in_float} of {every} layers in float for the budget {part.budget}", predicted, *found)


def title(report: Report) -> str:
    """Word the scheme, or where there are several how many bits they average."""
    mixed = report.assignment is not None and not report.assignment.limits_loss
    return f"{report.assignment.average_bits:.3g} bits" if report.assignment and mixed else report.scheme


def parity(part: Parity) -> str:
    """Word the parity of one target: its measures, or the reason why there are none."""
    return _measured(
        part.reason,
        _number("max relative error ", part.max_relative_error, ".2g"),
        _number("cosine ", part.cosine, ".6f"),
        _number("KL ", part.kl, ".2g", " nats"),
        _number("run in ", part.pieces, "d", " pieces"),
    )


def fidelity(part: Fidelity) -> str:
    """Word the fidelity on one target: its measures, or the reason why there are none."""
    against = _number(" (float ", part.perplexity_float, ".4g", ")")
    return _measured(
        part.reason,
        _number("KL ", part.kl, ".3g", " nats"),
        _number("token by token ", None if part.kl_decode == part.kl else part.kl_decode, ".3g", " nats"),
        _number("top-1 ", part.top1, ".1%"),
        _number("perplexity ", part.perplexity, ".4g", against),
        _number("cosine ", part.cosine, ".5f"),
        _number("max |difference| ", part.max_abs, ".3g"),
    )


def latency(part: Latency) -> str:
    """Word the latency on one target: its measures and what they ran with, or the reason why there are none."""
    return _measured(
        part.reason,
        speed(part),
        busy(part),
        _number("p50 ", part.p50_ms, ".3g", _number(" ms (float ", part.float_p50_ms, ".3g", f" ms{pieces(part)})") or " ms"),
        _number("p95 ", part.p95_ms, ".3g", " ms"),
        spread(part),
        _number("prefill ", part.prefill_tokens_per_s, ".0f", " tokens/s"),
        _number("decode ", part.decode_tokens_per_s, ".0f", " tokens/s"),
        "" if part.threads is None else settings(part),
        _number("accuracy level ", part.accuracy_level, "d"),
        _number("", part.device_nodes, "d", f" nodes on {part.target}"),
        "" if part.cpu_nodes is None else f"{len(part.cpu_nodes)} on the CPU",
        _number("", part.copies, "d", " copy between them" if part.copies == 1 else " copies between them"),
        memory(part),
    )


def spread(part: Latency) -> str:
    """Word how far repeats are apart: "half of 12 runs within 166 to 169 ms, of 12 of float within 180 to 185 ms"."""
    if part.repeats is None or part.p25_ms is None or part.p75_ms is None:
        return ""
    runs = "1 run" if part.repeats == 1 else f"half of {part.repeats} runs within {part.p25_ms:.3g} to {part.p75_ms:.3g} ms"
    if part.repeats == 1 or part.float_p25_ms is None or part.float_p75_ms is None:
        return runs
    return f"{runs}, of {part.float_repeats} of float within {part.float_p25_ms:.3g} to {part.float_p75_ms:.3g} ms"


def memory(part: Latency) -> str:
    """Word what a process needs that loads the graphs: "69.9 MB of memory when loaded, 81 MB while loading"."""
    if part.loaded_bytes is None or part.loading_bytes is None:
        return ""
    return f"{byte_size(part.loaded_bytes)} of memory when loaded, {byte_size(part.loading_bytes)} while loading"


def pieces(part: Latency) -> str:
    """Say that the float model was run in pieces: ", in 9 pieces, 3 of them measured"; "" where it was run whole."""
    if part.float_pieces is None:
        return ""
    return f", in {part.float_pieces} pieces, {part.float_pieces_measured} of them measured"


def busy(part: Latency) -> str:
    """Say that other programs took part of the cores while this was measured; "" where they did not."""
    if not part.busy:
        return ""
    why = "" if part.others_share is None else f": other programs took {part.others_share:.0%} of its cores' time"
    return f"measured while the machine was busy{why}"


def processor(part: Processor) -> str:
    """Word the processor's name, and what is known of its features: "AMD EPYC (x86_64, AVX-512, VNNI, no AMX)"."""
    names = {"avx512": "AVX-512", "vnni": "VNNI", "amx": "AMX", "dot_product": "dot product"}
    known = {name: value for field, name in names.items() if (value := getattr(part, field)) is not None}
    return (
        f"{part.name} ({', '.join([part.architecture, *(name if value else f'no {name}' for name, value in known.items())])})"
    )


def settings(part: Latency | Trial) -> str:
    """Word the settings of a session: "2 threads", "2 threads without spinning"."""
    threads = "1 thread" if part.threads == 1 else f"{part.threads} threads"
    return threads if part.spinning or part.spinning is None else f"{threads} without spinning"


def speed(part: Latency) -> str:
    """Say plainly whether the artifact is slower than float, where repeats show it; of a busy machine only the ratio of
    processor times is said.
    """
    if part.speedup is None:
        return ""
    if part.busy:
        return f"{part.speedup:.2f} x the speed of float, by processor time"
    if not part.is_clear:
        reason = "one of them was timed too few times" if part.is_rarely_timed else "their spreads overlap"
        return f"{part.speedup:.2f} x the speed of float, but {reason}: neither was shown to be faster"
    if round(part.speedup, 2) == 1:
        return "as fast as float"
    if part.speedup < 1:
        return f"slower than float: {part.speedup:.2f} x its speed"
    return f"{part.speedup:.2f} x the speed of float"


def gate(part: GateResult) -> str:
    """Word a gate, its value and whether it was kept."""
    value = "not measured" if part.value is None else f"{part.value:.4g}"
    return f"{part.metric} {part.comparison} {part.limit:.4g}: {value}, {'kept' if part.passed else 'MISSED'}"


def worst(layers: Iterable[LayerReport]) -> list[LayerReport]:
    """Return the layers that lost most, worst first."""
    return sorted(layers, key=lambda layer: -layer.relative_error)[:WORST_LAYERS]


def has_codebook(layers: Iterable[LayerReport]) -> bool:
    """Return whether a layer has codes that are places in a codebook."""
    return any(is_codebook(layer.scheme) for layer in layers)


def is_codebook(text: str) -> bool:
    """Return whether the text of a layer's scheme is that of one with a codebook."""
    scheme = parse_scheme(text)
    return isinstance(scheme, QuantScheme) and scheme.codebook is not None


def is_weights_only(text: str) -> bool:
    """Return whether the text of a layer's scheme is that of integer weights with float activations."""
    scheme = parse_scheme(text)
    return isinstance(scheme, QuantScheme) and scheme.activations is None and scheme.codebook is None


def schemes(layers: Iterable[LayerReport]) -> str:
    """Word how many layers have each scheme, most first: "210 int4-g32, 1 int8-channel"."""
    counts = Counter(layer.scheme for layer in layers)
    return ", ".join(f"{count} {scheme}" for scheme, count in counts.most_common())


def outliers(layers: Iterable[LayerReport]) -> str:
    """Word the share of float columns, and how many layers have some; "" where none has."""
    shares = [layer.outlier_share or 0 for layer in layers]
    some_have = sum(share > 0 for share in shares)
    if not some_have:
        return ""
    return (
        f"{sum(shares) / len(shares):.2%} of a layer's input columns kept in float beside the codes, on average; "
        f"{some_have} of {len(shares)} layers have some"
    )


def activations(part: ActivationRanges) -> str:
    """Word how many values have a static range, what chose them, and how much is clipped of the one that loses most."""
    count = len(part.values)
    worst = max(part.values, key=lambda value: value.clipped, default=None)
    words = f"{count} {'value' if count == 1 else 'values'} in {part.estimator} ranges"
    if not any(value.count for value in part.values):  # training has found them, and nobody counts what it clips
        return words
    if worst is None or not worst.clipped:
        return f"{words}, none clipped"
    return f"{words}, at most {100 * worst.clipped:.2g} % of one clipped: {printable(worst.name)}"


def kv_cache(part: CacheReport) -> str:
    """Word what a cache in codes takes, and what it loses."""
    words = (
        f"{part.kind}, {byte_size(part.bytes_per_token)} per token, where float takes {byte_size(part.float_bytes_per_token)}"
    )
    loss = part.loss
    if loss is None:
        return words
    return _measured(
        None,
        f"{words}; against a float cache at {loss.context} tokens: KL {loss.kl:.3g}",
        _number("same top token ", None if loss.top1 is None else 100 * loss.top1, ".1f", " %"),
        f"perplexity {loss.perplexity:.4g} instead of {loss.perplexity_float_cache:.4g}",
    )


def reasons(kept: Iterable[KeptFloat]) -> list[tuple[str, list[str]]]:
    """Return the modules kept in float, by reason, in the order of first appearance."""
    return by_reason({part.name: part.reason for part in kept})


def zeroed(layers: Iterable[LayerReport], limit: int = 5) -> list[str]:
    """Return a line for each of the tensors with most values that are too small for the type that they were cast to."""
    found = sorted((layer for layer in layers if layer.zeroed), key=lambda layer: -(layer.zeroed or 0))
    lines = [
        f"{printable(layer.name)}: {layer.zeroed} {'value' if layer.zeroed == 1 else 'values'} became 0 in {layer.scheme}, "
        f"the largest was {layer.largest_zeroed:.3g}"
        for layer in found[:limit]
    ]
    if len(found) > limit:
        lines.append(f"and {len(found) - limit} more tensors, in report.json")
    return lines + (["bfloat16 has numbers that small"] if found and found[0].scheme == "float16" else [])


def other_schemes(layers: Iterable[LayerReport | LayerPlan]) -> list[tuple[str, list[str]]]:
    """Return the layers without the scheme that was asked for, by "int4-g16: REASON", in the order of first appearance."""
    return by_reason({layer.name: f"{layer.scheme}: {layer.reason}" for layer in layers if layer.reason is not None})


def by_reason(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return the names that have a reason in common, in the order of first appearance. reasons: of each name."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(printable(name))
    return list(grouped.items())


def some(names: list[str], limit: int = 3) -> str:
    """List a few names: "a, b, c and 4 more"."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _number(before: str, value: float | None, form: str, after: str = "") -> str:
    return "" if value is None else f"{before}{value:{form}}{after}"


def _measured(reason: str | None, *parts: str) -> str:
    return ", ".join(part for part in (*parts, printable(reason or "")) if part)
