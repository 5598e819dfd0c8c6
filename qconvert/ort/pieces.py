"""A graph whose weights are too large to be held in float32 at once, run piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import DataType

from qconvert.graph import pieces
from qconvert.ir.timing import Timing
from qconvert.ort.session import EncoderDecoderSession, Values, ort_value
from qconvert.ort.several import several

# Values between pieces stay what onnxruntime made: numpy has no bfloat16.
OrtValues = dict[str, Any]
OpenPiece = Callable[[onnx_ir.Model], Any]
Run = Callable[[], list[np.ndarray[Any, Any]]]
Measure = Callable[[Callable[[], object]], Timing]  # of a call
TYPES = {
    DataType.FLOAT: "tensor(float)",
    DataType.INT8: "tensor(int8)",
    DataType.INT64: "tensor(int64)",
    DataType.BOOL: "tensor(bool)",
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph, as onnxruntime describes it."""

    name: str
    shape: list[int | str | None]
    type: str


@dataclass(frozen=True, slots=True)
class PieceTimes:
    """How long a graph takes that was run in pieces.

    timing: of all pieces. measured: how many were run; the others are like one of those.
    """

    timing: Timing
    pieces: int
    measured: int


def sized_session(model: onnx_ir.Model, open_piece: OpenPiece) -> Any:
    """Open a session over a graph in memory, piece by piece if its weights take more than WHOLE_BYTES.

    open_piece: opens a session over a graph whose initializers may lack data (see ort.session.memory_session).
    """
    if pieces.weight_bytes(model.graph.initializers.values()) <= pieces.WHOLE_BYTES:
        return open_piece(model)
    return PiecewiseSession(model, open_piece)


def run_each(session: Any, feeds: Sequence[Values], first: int | None = None) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Yield the outputs for one input after the other. first: how many of the outputs; unset, all."""
    return (run() for run in each_run(session, feeds, first))


def each_run(session: Any, feeds: Sequence[Values], first: int | None = None, at_once: int = 1) -> Iterator[Run]:
    """Yield, for one input after the other, what runs the session on it, and may be called on any thread.

    at_once: inputs that go through the pieces of a graph at the same time; through the last piece they go when they are run.
    """
    match session:
        case PiecewiseSession():
            yield from session.each_run(feeds, first, at_once)
        case EncoderDecoderSession() if piece_count(session) is not None:
            known = _encoded(session, feeds)
            decoded = each_run(session.decoder, [session.decoder_inputs(each) for each in known], first, at_once)
            cross = [] if first else [port.name for port in session.cross_outputs()]
            for each, run in zip(known, decoded, strict=True):
                yield partial(_with, run, [each[name] for name in cross])
        case _:
            for each in feeds:
                yield partial(_first, session, each, first)


def _with(run: Run, others: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    return [*run(), *others]


def _first(session: Any, inputs: Values, count: int | None) -> list[np.ndarray[Any, Any]]:
    outputs: list[np.ndarray[Any, Any]] = session.run(None, inputs)
    return outputs[:count]


def piece_count(session: Any) -> int | None:
    """Return into how many pieces a session's graphs are divided; None where they are run whole."""
    match session:
        case PiecewiseSession():
            return session.piece_count
        case EncoderDecoderSession():
            counts = piece_count(session.encoder), piece_count(session.decoder)
            return None if counts == (None, None) else sum(count or 1 for count in counts)
        case _:
            return None


def times_in_pieces(session: Any, inputs: Values, measure: Measure) -> PieceTimes:
    """Return how long a run takes, as `measure` says of each piece by itself."""
    match session:
        case PiecewiseSession():
            return session.times(inputs, measure)
        case EncoderDecoderSession():
            encoder = times_in_pieces(session.encoder, _own(session.encoder, inputs), measure)
            decoder = times_in_pieces(session.decoder, session.decoder_inputs(*_encoded(session, [inputs])), measure)
            pieces, measured = encoder.pieces + decoder.pieces, encoder.measured + decoder.measured
            return PieceTimes(encoder.timing + decoder.timing, pieces, measured)
        case _:
            return PieceTimes(measure(partial(session.run, None, inputs)), 1, 1)


def _encoded(session: EncoderDecoderSession, feeds: Sequence[Values]) -> list[Values]:
    """Return the feeds, with what the encoder gives for those that hold its inputs."""
    if "input_ids" not in feeds[0]:
        return list(feeds)
    names = [port.name for port in session.encoder.get_outputs()]
    found = run_each(session.encoder, [_own(session.encoder, each) for each in feeds])
    return [each | dict(zip(names, outputs, strict=True)) for each, outputs in zip(feeds, found, strict=True)]


def _own(session: Any, inputs: Values) -> Values:
    return {port.name: inputs[port.name] for port in session.get_inputs()}


class PiecewiseSession:
    """A graph of which one piece at a time is open. Every run opens them anew, but `run_each` once for all of its inputs."""

    def __init__(self, model: onnx_ir.Model, open_piece: OpenPiece) -> None:
        self._graph, self._open = model.graph, open_piece
        self._pieces = pieces.divide(model, pieces.PIECE_BYTES)

    @property
    def piece_count(self) -> int:
        """How many pieces there are."""
        return len(self._pieces)

    def get_inputs(self) -> list[Port]:
        """Return the graph's inputs."""
        return [_port(value) for value in self._graph.inputs]

    def get_outputs(self) -> list[Port]:
        """Return the graph's outputs."""
        return [_port(value) for value in self._graph.outputs]

    def run(self, names: None, feeds: Values) -> list[np.ndarray[Any, Any]]:
        """Run all pieces, and return the graph's outputs in order."""
        return next(self.run_each([feeds]))

    def run_each(self, feeds: Sequence[Values], first: int | None = None) -> Iterator[list[np.ndarray[Any, Any]]]:
        """Yield what `run` returns for each of the inputs."""
        return (run() for run in self.each_run(feeds, first))

    def each_run(self, feeds: Sequence[Values], first: int | None = None, at_once: int = 1) -> Iterator[Run]:
        """Yield what `each_run` yields; between two pieces what crosses there is kept of all inputs."""
        outputs = [str(value.name) for value in self._graph.outputs[:first]]
        known = [{name: ort_value(value) for name, value in each.items()} for each in feeds]
        for number, piece in enumerate(self._pieces[:-1]):
            needed = {str(value.name) for later in self._pieces[number + 1 :] for value in later.graph.inputs} | {*outputs}
            session = self._open(_typed(piece, known[0]))
            for place, found in enumerate(several(partial(_run, session, piece), known, at_once)):
                known[place] = {name: value for name, value in (known[place] | found).items() if name in needed}
            del session  # before the next one is opened
        last = self._pieces[-1]
        session = self._open(_typed(last, known[0]))
        for place in range(len(known)):
            values, known[place] = known[place], {}
            yield partial(_run_last, session, last, values, outputs)

    def times(self, inputs: Values, measure: Measure) -> PieceTimes:
        """Add up what `measure` says of a run of each piece. Of those that are alike, as in a stack of blocks, one is run."""
        known = {name: ort_value(value) for name, value in inputs.items()}
        timings: list[Timing] = []
        measured: dict[object, tuple[Timing, list[Any]]] = {}
        for piece in self._pieces:
            kind = _kind(piece.graph)
            if kind not in measured:
                session = self._open(_typed(piece, known))
                run = partial(_run, session, piece, known)
                measured[kind] = measure(run), list(run().values())
                del session, run
            timing, found = measured[kind]
            timings.append(timing)
            known |= {str(value.name): given for value, given in zip(piece.graph.outputs, found, strict=True)}
        return PieceTimes(reduce(add, timings), len(self._pieces), len(measured))


def _port(value: onnx_ir.Value) -> Port:
    dims = () if value.shape is None else value.shape.dims
    shape = [dim if isinstance(dim, int) else dim.value for dim in dims]
    return Port(str(value.name), shape, TYPES.get(value.dtype, "") if value.dtype else "")


def _typed(piece: onnx_ir.Model, known: OrtValues) -> onnx_ir.Model:
    """The piece, with types for those of its inputs that a node before it gives and the graph knows no type of."""
    for value in piece.graph.inputs:
        if value.dtype is None:
            value.dtype = DataType(known[str(value.name)].element_type())
    return piece


def _run(session: Any, piece: onnx_ir.Model, known: OrtValues) -> OrtValues:
    """Run a piece: the values that it gives, by name."""
    inputs = {str(value.name): known[str(value.name)] for value in piece.graph.inputs}
    outputs = [str(value.name) for value in piece.graph.outputs]
    return dict(zip(outputs, session.run_with_ort_values(outputs, inputs), strict=True))


def _run_last(session: Any, piece: onnx_ir.Model, known: OrtValues, outputs: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """Run the last piece, and return the outputs of the whole graph."""
    found = known | _run(session, piece, known)
    return [found[name].numpy() for name in outputs]


def _kind(graph: onnx_ir.Graph) -> object:
    """What pieces that take the same time have in common: nodes and shapes of weights."""
    shapes = [str(value.shape) for value in graph.initializers.values()]
    return (
        tuple((node.domain, node.op_type, len(node.inputs)) for node in graph),
        tuple(shapes),
        len(graph.inputs),
        len(graph.outputs),
    )
