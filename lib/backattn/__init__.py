"""Companion library to "Back Attention" (multi-hop reasoning in large language models)."""

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backattn.adapters.back_attention import BackAttentionModel, get_back_attention_model
    from backattn.adapters.config import BackAttentionConfig
    from backattn.analysis.flow_back import flow_back
    from backattn.analysis.logit_flow import logit_flow
    from backattn.models.load import load_model

__all__ = [
    "BackAttentionConfig",
    "BackAttentionModel",
    "flow_back",
    "get_back_attention_model",
    "load_model",
    "logit_flow",
]
__version__ = "0.1.0"
_HOMES = {
    "BackAttentionConfig": "adapters.config",
    "BackAttentionModel": "adapters.back_attention",
    "flow_back": "analysis.flow_back",
    "get_back_attention_model": "adapters.back_attention",
    "load_model": "models.load",
    "logit_flow": "analysis.logit_flow",
}

# Bars here are plain text, so tqdm's advice to install its notebook widgets is noise in notebooks.
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name: str):
    """Import what is asked for when it is: torch and transformers take seconds (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"backattn.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
