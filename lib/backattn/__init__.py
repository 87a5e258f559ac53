"""Companion library to "Back Attention: Understanding and Enhancing Multi-Hop Reasoning in Large Language Models"."""

from . import runtime as runtime  # first: it quiets a warning that transformers' import would cause
from .adapters.back_attention import BackAttentionModel, get_back_attention_model
from .adapters.config import BackAttentionConfig
from .analysis.flow_back import flow_back
from .analysis.logit_flow import logit_flow
from .models.load import load_model

__all__ = [
    "BackAttentionConfig",
    "BackAttentionModel",
    "flow_back",
    "get_back_attention_model",
    "load_model",
    "logit_flow",
]
__version__ = "0.1.0"
