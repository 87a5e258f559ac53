"""Back attention: after a normal pass, a low layer attends to the high layers' states and the upper layers run again.

State h_t enters layer t; h_L, with L layers, enters the final norm. At source layer s, with memory layers t,

    B_i = Σ softmax_{(t, j ≤ i)} ( N(h_s,i) W_q · N(h_t,j) W_k / √d ) N(h_t,j) W_v W_o        (paper, section 5)

is added to h_s and layers s … L−1 run again; h_t are the states of the first, unmodified pass. Our reading, where the
paper is silent: one softmax over all (layer, position) pairs, and N, an RMS norm without weights, in front of the
projections, because raw high-layer states hold a few huge entries. Both are options of the config.

Everything happens in hooks at layer boundaries, so that the wrapped model's own forward, loss and `generate` are the
adapted ones.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import BackAttention
from backattn.adapters.saving import (
    _PREFIX,
    CONFIG_FILE,
    PEFT_TYPE,
    WEIGHTS_FILE,
    AdapterError,
    _read_folder,
    unembedding_hash,
)
from backattn.adapters.two_pass import TwoPassModel
from backattn.files import atomic_file
from backattn.models.decoder import describe

# pipeline("text-generation") logs an error for a class that is not in this list.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("back_attention", "BackAttentionModel")


class BackAttentionModel(TwoPassModel):
    """A decoder with back attention; made by `get_back_attention_model` or `from_pretrained`.

    one_pass: set it to True for a cheaper `generate` (our variant). The prompt is read as before, in two passes. A new
    token has one: at the source layer it reads the memory of earlier tokens only, and goes on up from there, attending
    to their second pass. What it leaves in memory are its own states of that pass.
    """

    def __init__(self, model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True):
        arch = describe(model)
        memory = config.memory(len(arch.blocks))
        updates = {layer: BackAttention(arch.width, config) for layer in config.sources}
        super().__init__(model, updates, memory, freeze_base)
        self.back_attention_config = config

    @contextlib.contextmanager
    def edited(self, cells: Tensor | None = None, memory: Tensor | None = None) -> Iterator[None]:
        """Change what can be read while the block runs, to test what is used.

        cells: [B, T, M, S] bool (B and T may be 1): False hides a (memory layer, position) from a query. The softmax
        goes over the others, and a query that may read none gets no update. S counts the positions in a cache too.
        memory: [M, B, S, D], states to be read instead of the first pass's; not with a cache.

        Raises ValueError for another shape, here or when the model is called.
        """
        count = len(self.memory_layers)
        if cells is not None and (cells.dim() != 4 or cells.shape[2] != count):
            raise ValueError(
                f"cells must be [batch, queries, {count} memory layers, positions], not {list(cells.shape)}."
            )
        if memory is not None and (memory.dim() != 4 or len(memory) != count):
            raise ValueError(
                f"memory must be [{count} memory layers, batch, positions, width], not {list(memory.shape)}."
            )
        before = self._cells, self._instead
        self._cells, self._instead = cells, memory
        try:
            yield
        finally:
            self._cells, self._instead = before

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors; other files stay.

        The config names the base model, its revision and a hash of its unembedding, checked on load. dtype: of the
        file, for example torch.float16; None keeps fp32. A base model that was trained too is saved on its own.
        """
        base = self.base_model
        about = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.config.name_or_path,
            "revision": getattr(base.config, "_commit_hash", None),
            "unembedding_hash": unembedding_hash(base),
            **asdict(self.back_attention_config),
        }
        tensors = {
            _PREFIX + name: t.to(dtype or t.dtype).cpu().contiguous()
            for name, t in self.adapter_state().items()
        }
        with atomic_file(Path(folder) / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary)
        with atomic_file(Path(folder) / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> "BackAttentionModel":
        """Put a saved adapter on its base model.

        folder: a local folder, or a Hugging Face id. Raises AdapterError when it is not there, is no back-attention
        adapter, is damaged, or was trained on another base model (another unembedding).
        """
        about, weights = _read_folder(folder)
        hashed = unembedding_hash(model)
        if about.get("unembedding_hash") != hashed:
            raise AdapterError(
                f"{folder} was trained on {about.get('base_model_name_or_path')!r} (revision {about.get('revision')}), "
                f"whose unembedding differs from this model's ({model.config.name_or_path!r}). Load that base model."
            )
        names = BackAttentionConfig.__dataclass_fields__
        try:
            options = {
                key: tuple(v) if isinstance(v, list) else v
                for key, v in about.items()
                if key in names
            }
            wrapped = cls(model, BackAttentionConfig(**options))
        except (TypeError, ValueError) as error:
            raise AdapterError(
                f"{folder}/{CONFIG_FILE} does not fit this model: {error}"
            ) from error
        expected = {_PREFIX + name: t for name, t in wrapped.adapter_state().items()}
        wrong = sorted({*expected} ^ {*weights}) or sorted(
            n for n in expected if expected[n].shape != weights[n].shape
        )
        wrong += [name for name in weights if not weights[name].isfinite().all()]
        if wrong:
            wrapped.unload()
            raise AdapterError(
                f"{folder}/{WEIGHTS_FILE}: {wrong[0]} is missing, unknown, misshapen or not finite."
            )
        with torch.no_grad():
            for name, p in wrapped.updates.named_parameters():
                p.copy_(weights[f"{_PREFIX}updates.{name}"])
        return wrapped


def get_back_attention_model(
    model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True
) -> BackAttentionModel:
    """Put untrained back attention on a Hugging Face decoder; until it is trained, its output is the model's own.

    model: any supported decoder with its language-model head (see `backattn.arch`), fp32 or bf16; the adapter is fp32.
    freeze_base: False trains the model's weights too (from scratch).

    The model itself carries the hooks until `unload()`. Draws the projections' weights from torch's generator.
    Raises UnsupportedModelError for another family, ValueError for layers that the model does not have and for a
    model that carries an adapter already.
    """
    return BackAttentionModel(model, config, freeze_base)
