"""Companion library to "Back Attention" (multi-hop reasoning in large language models)."""

from backattn import runtime as runtime  # first: it quiets a warning of transformers' import
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
