"""Attention as one ONNX Runtime op: GroupQueryAttention for decoders, MultiHeadAttention for encoders and for both
halves of an encoder-decoder.

transformers models look their attention up by name; under the names registered here they emit the op and skip the
building of masks, which the op does itself. What an architecture computes beyond that (relative positions, say) is
lost silently, so a template made this way is used only after a numeric check (trace/check.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DECODER, ENCODER, ENCODER_DECODER = "qconvert-decoder", "qconvert-encoder", "qconvert-encoder-decoder"


@dataclass
class AttentionContext:
    """The values that the attention of every block needs from the graph around it, for the duration of one trace.

    past: layer index -> (key, value) [batch, kv_heads, past, head_size]; present likewise, filled by the blocks.
    last_place: [batch] int32, where in the cache the last column of this run goes; total: int32 scalar, length of the rows.
    padding: [batch, sequence] int32, 1 where a token is (encoders, and the source that a decoder attends to).
    cross: layer index -> (key, value) [batch, heads, source, head_size] of a decoder's cross-attention.
    fresh: layer index -> (key, value) of an encoder-decoder's new tokens [batch, heads, sequence, head_size].
    rotary: (cos, sin) [positions, rotary_dim / 2] if the op is to rotate queries and keys itself.
    rotated: whether the block that is being traced asked for rotation.
    """

    past: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last_place: Tensor | None = None
    total: Tensor | None = None
    padding: Tensor | None = None
    cross: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rotary: tuple[Tensor, Tensor] | None = None
    rotated: bool = False


_context = AttentionContext()


@contextmanager
def attention_context() -> Iterator[AttentionContext]:
    """Give the trace within the context an AttentionContext of its own."""
    global _context
    previous, _context = _context, AttentionContext()
    try:
        yield _context
    finally:
        _context = previous


def _joined(x: Tensor) -> Tensor:
    """[batch, heads, sequence, head_size] -> [batch, sequence, heads * head_size]."""
    batch, heads, sequence, size = x.shape
    return x.transpose(1, 2).reshape(batch, sequence, heads * size)


def group_query_attention(  # noqa: PLR0913 - as transformers calls attention functions
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Trace com.microsoft::GroupQueryAttention on query [batch, heads, sequence, head_size], key and value with kv_heads."""
    batch, heads, sequence, size = query.shape
    kv_heads = key.shape[1]
    index = int(module.layer_idx)  # type: ignore[arg-type]
    past_key, past_value = _context.past[index]
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(scaling if scaling is not None else size**-0.5),
    }
    if sliding_window:
        attributes["local_window_size"] = int(sliding_window)
    if softcap:
        attributes["softcap"] = float(softcap)
    assert _context.last_place is not None
    assert _context.total is not None
    inputs = [_joined(query), _joined(key), _joined(value), past_key, past_value, _context.last_place, _context.total]
    if _context.rotary is not None and _context.rotated:
        attributes["do_rotary"] = 1
        inputs += _context.rotary
        _context.rotated = False
    cache = (batch, kv_heads, past_key.shape[2] + sequence, size)
    out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attributes,
        dtypes=(torch.float32,) * 3,
        shapes=[(batch, sequence, heads * size), cache, cache],
        version=1,
    )
    _context.present[index] = present_key, present_value
    return out.view(batch, sequence, heads, size), None


def multi_head_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Trace com.microsoft::MultiHeadAttention on query, key and value [batch, heads, sequence, head_size]."""
    _refuse_windows(more)
    batch, heads, sequence, size = query.shape
    assert _context.padding is not None
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (_joined(query), _joined(key), _joined(value), None, _context.padding),
        attrs={"num_heads": heads, "scale": float(scaling if scaling is not None else size**-0.5)},
        dtype=torch.float32,
        shape=(batch, sequence, heads * size),
        version=1,
    )
    return out.view(batch, sequence, heads, size), None


def encoder_decoder_attention(  # noqa: PLR0913 - as transformers calls attention functions
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Trace com.microsoft::MultiHeadAttention: an encoder's, a decoder's on its cache, or that of a decoder on its source.

    position_bias: [1, heads, sequence, total], added to the scores.
    """
    _refuse_windows(more)
    batch, heads, sequence, size = query.shape
    index = int(getattr(module, "layer_idx", None) or 0)  # encoders may count nothing: only decoders have caches
    attributes: dict[str, Any] = {"num_heads": heads, "scale": float(scaling if scaling is not None else size**-0.5)}
    shape = (batch, sequence, heads * size)
    if index in _context.past and key is not _context.cross[index][0]:
        past_key, past_value = _context.past[index]
        new_key, new_value = _context.fresh[index]
        cache = (batch, heads, past_key.shape[2] + sequence, size)
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::MultiHeadAttention",
            (_joined(query), _joined(new_key), _joined(new_value), None, None, position_bias, past_key, past_value),
            attrs={**attributes, "unidirectional": 1},
            dtypes=(torch.float32,) * 3,
            shapes=[shape, cache, cache],
            version=1,
        )
        _context.present[index] = present[0], present[1]
        return out.view(batch, sequence, heads, size), None
    # What the encoder has made for the cross-attention goes in as it is, [batch, heads, source, head_size].
    keys = (key, value) if index in _context.past else (_joined(key), _joined(value))
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (_joined(query), *keys, None, _context.padding, position_bias),
        attrs=attributes,
        dtype=torch.float32,
        shape=shape,
        version=1,
    )
    return out.view(batch, sequence, heads, size), None


def _refuse_windows(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for what MultiHeadAttention can't do; the next form is tried then. A window that is longer than the
    probes of trace/check.py would not be missed there."""
    found = [name for name in ("sliding_window", "softcap") if settings.get(name)]
    if found:
        raise ValueError(f"MultiHeadAttention has no {' and no '.join(found)}")


ALL_ATTENTION_FUNCTIONS.register(DECODER, group_query_attention)
ALL_ATTENTION_FUNCTIONS.register(ENCODER, multi_head_attention)
ALL_ATTENTION_FUNCTIONS.register(ENCODER_DECODER, encoder_decoder_attention)


class NoCache:
    """Takes the place of a KV cache in the trace: keys and values pass through, the attention op does the caching."""

    is_compileable = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values as they are."""
        return key, value

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Return 0: nothing has gone before."""
        return 0


class SelfCache(NoCache):
    """The half of an encoder-decoder's cache that holds the decoder's own tokens. Models read the total length off the
    keys, so they are given joined; the op gets the two parts."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the layer's past keys and values with the new ones behind them, and note the new ones."""
        if layer_idx not in _context.past:
            return key, value
        _context.fresh[layer_idx] = key, value
        past_key, past_value = _context.past[layer_idx]
        return torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Return the number of tokens that the past holds."""
        return next((key.shape[2] for key, _ in _context.past.values()), 0)


class SourceCache(NoCache):
    """The half that holds what the decoder attends to in the source: filled when the encoder is traced, and read when
    the decoder is."""

    @property
    def layers(self) -> Mapping[int, SimpleNamespace]:
        """The keys and values that attend to the source, by layer."""
        return {index: SimpleNamespace(keys=key, values=value) for index, (key, value) in _context.cross.items()}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Note the keys and values of the source as the encoder's, and return them."""
        _context.cross[layer_idx] = key, value
        return key, value


class EncoderDecoderStandIn(EncoderDecoderCache):  # type: ignore[misc]
    """Both halves; models ask whether their cache is an EncoderDecoderCache."""

    def __init__(self) -> None:
        self.self_attention_cache, self.cross_attention_cache = SelfCache(), SourceCache()
        self.is_updated = dict.fromkeys(_context.cross, True)


@contextmanager
def rotation_left_to_attention(module: nn.Module) -> Iterator[None]:
    """Make the model's own rotation of queries and keys a no-op that only notes that it was asked for."""
    owners = {sys.modules[type(part).__module__] for part in module.modules()}
    patched = {owner: owner.apply_rotary_pos_emb for owner in owners if hasattr(owner, "apply_rotary_pos_emb")}

    def leave_to_attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _context.rotated = True
        return query, key

    try:
        for owner in patched:
            owner.apply_rotary_pos_emb = leave_to_attention  # type: ignore[attr-defined]
        yield
    finally:
        for owner, function in patched.items():
            owner.apply_rotary_pos_emb = function  # type: ignore[attr-defined]


def rotary_caches(module: nn.Module, positions: int) -> tuple[Tensor, Tensor]:
    """Return the (cos, sin) [positions, rotary_dim / 2] that GroupQueryAttention rotates with.

    Raises ValueError where the model has no rotary embedding of that kind.
    """
    found = [part for name, part in module.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1:
        raise ValueError(f"the model has {len(found)} rotary embeddings")
    with torch.no_grad():
        try:
            cos, sin = found[0](torch.zeros(1), torch.arange(positions)[None])
            short, _ = found[0](torch.zeros(1), torch.arange(8)[None])
        except TypeError as error:
            raise ValueError("the rotary embedding differs per layer type") from error
    half = cos.shape[-1] // 2
    if not torch.equal(short[0], cos[0, :8]) or not torch.equal(cos[..., :half], cos[..., half:]):
        raise ValueError("the rotary embedding depends on the length, or is interleaved")
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
