"""Companion library to "Back Attention: Understanding and Enhancing Multi-Hop Reasoning in Large Language Models"."""

from . import runtime as runtime  # first: it quiets a warning that transformers' import would cause
from .back_attention import BackAttentionConfig, BackAttentionModel, get_back_attention_model
from .flow_back import flow_back
from .logit_flow import logit_flow
from .models import load_model

__all__ = [
    "BackAttentionConfig",
    "BackAttentionModel",
    "flow_back",
    "get_back_attention_model",
    "load_model",
    "logit_flow",
]
__version__ = "0.1.0"
