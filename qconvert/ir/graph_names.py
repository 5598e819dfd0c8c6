"""Names of inputs and outputs of graphs that mean something: caches, and what an encoder hands to its decoder."""

from __future__ import annotations

# Prefix of what an encoder computes for its decoder's cross-attention, once for all steps.
CROSS = "cross_key_values."

# What a decoder's graph calls the inputs that a whole encoder-decoder calls otherwise, as transformers does.
WHOLE_NAMES = {"input_ids": "decoder_input_ids", "encoder_attention_mask": "attention_mask"}


def is_cache(name: str) -> bool:
    """Return whether an input or output holds keys and values that one run gives and the next one takes."""
    return name.startswith(("past_key_values.", "present.", CROSS))
