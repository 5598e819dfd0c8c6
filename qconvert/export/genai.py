"""genai_config.json: what onnxruntime-genai has to know to run the folder as it is.

Source: the configurations that onnxruntime-genai's model builder writes, and https://onnxruntime.ai/docs/genai/reference/config.html.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx_ir

from qconvert.graph.cache_codes import cached_attentions
from qconvert.graph.phases import bodies_of
from qconvert.ir.artifact import GENAI_CONFIG
from qconvert.ir.model import Model
from qconvert.storage.disk import disk_errors
from qconvert.storage.stage import Stage
from qconvert.targets import graph_files
from qconvert.targets.target import Target

# The name of onnxruntime-genai for any decoder that is one graph with a KV cache, whatever its architecture.
MODEL_TYPE = "decoder"
CACHE = ("past_key_values.%d.key", "past_key_values.%d.value")
SEARCH_OPTIONS = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")


def write_genai_config(model: Model, graph: onnx_ir.Graph, target: Target, stage: Stage) -> None:
    """Write genai_config.json for a decoder whose blocks have caches of one shape, to run on `target`.

    graph: the one for that target. Raises ResourceError (disk).
    """
    path = stage.folder / GENAI_CONFIG
    cache = _cache_shape(graph)
    if cache is None:
        return
    config = _genai_config(model.module.config, model.generation_config, graph, cache)
    config["model"]["decoder"] = {
        "filename": graph_files(model.task, target)["model"],
        "session_options": {"provider_options": list(target.provider_options)},
        **config["model"]["decoder"],
    }
    text = json.dumps(config, indent=2) + "\n"
    with disk_errors(path):
        path.write_text(text, encoding="utf-8")


def _genai_config(
    config: Any, generation: Mapping[str, Any], graph: onnx_ir.Graph, cache: tuple[int, int, int]
) -> dict[str, Any]:
    """config: of transformers, which knows the names that an architecture has for a setting."""
    layers, kv_heads, head_size = cache
    attentions = [attention for body in (*bodies_of(graph), graph) for attention in cached_attentions(body)]
    first, last, pad = (_tokens(name, config, generation) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    context = int(config.max_position_embeddings)
    model: dict[str, Any] = {
        "type": MODEL_TYPE,
        "context_length": context,
        "vocab_size": int(config.vocab_size),
        "bos_token_id": first[0] if first else None,
        "eos_token_id": last if len(last) > 1 else last[0] if last else None,
        "pad_token_id": (pad or last or [0])[0],  # without one, onnxruntime-genai does not load the folder
        "decoder": {
            "hidden_size": int(config.hidden_size),
            "head_size": head_size,
            "num_attention_heads": attentions[0].node.attributes["num_heads"].as_int(),
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": layers,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": CACHE[0],
                "past_value_names": CACHE[1],
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    # A prompt that is attended to in float makes a cache of its own length, which is none of max_length (graph/cache_codes.py).
    shared = not any(attention.begins_in_float for attention in attentions)
    search = {"max_length": context, "past_present_share_buffer": shared}
    search |= {key: generation[key] for key in SEARCH_OPTIONS if generation.get(key) is not None}
    return {"model": {key: value for key, value in model.items() if value is not None}, "search": search}


def _tokens(name: str, config: Any, generation: Mapping[str, Any]) -> list[int]:
    """The tokens of that name; those beyond the vocabulary, as in configurations made by hand, are left out."""
    found = generation.get(name, getattr(config, name, None))
    tokens = found if isinstance(found, list) else [found]
    return [token for token in tokens if token is not None and 0 <= token < config.vocab_size]


def _cache_shape(graph: onnx_ir.Graph) -> tuple[int, int, int] | None:
    """(blocks, heads, head size) of the KV cache; None without one, or where it differs from block to block."""
    values = {value.name: value for value in graph.inputs}
    shapes: list[tuple[int, int]] = []
    while (value := values.get(CACHE[0] % len(shapes))) is not None:
        heads, size = (value.shape[1], value.shape[3]) if value.shape is not None else (None, None)
        if not isinstance(heads, int) or not isinstance(size, int):
            return None
        shapes.append((heads, size))
    return (len(shapes), *shapes[0]) if len(set(shapes)) == 1 else None
