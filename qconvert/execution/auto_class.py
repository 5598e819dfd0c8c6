"""The class of transformers that loads a folder as the whole model that it was made from."""

from __future__ import annotations

import transformers

from qconvert.ir.model import Model

# The first that gives the model's own class is taken; AutoModel gives the body of a model that has a head.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForMaskedLM",
)


def auto_class(model: Model) -> str:
    """Return the name to import from transformers; that of the model's own class where no auto class gives it."""
    own = type(model.module)
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(model.module.config) in mapping and mapping[type(model.module.config)] is own:
            return name
    return own.__name__
