"""Back attention: a low layer attends to the high layers' states, and the upper layers run again.

State h_t enters layer t; h_L, with L layers, enters the final norm. The equation and the forward
pass are in `Call.second_pass` (paper, section 5). Our reading, where the paper is silent: one
softmax over all (layer, position) pairs, and N, an RMS norm without weights, in front of the
projections, because raw high-layer states hold a few huge entries. Both are options of the config.
"""

import contextlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from backattn.adapters import saving
from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import BackAttention
from backattn.adapters.two_pass import TwoPassModel
from backattn.models.decoder import describe


class BackAttentionModel(TwoPassModel):
    """A decoder with back attention; by `get_back_attention_model` or `from_pretrained`.

    one_pass: set it to True for a cheaper `generate` (our variant). The prompt is read as before,
    in two passes. A new token has one: at the source layer it reads the memory of earlier tokens
    only, and goes on up from there, attending to their second pass. What it leaves in memory are
    its own states of that pass.

    transformers' `pipeline` knows its own classes only: give it `base_model`, within `applied()`.

    Example:
        >>> wrapped = get_back_attention_model(model, BackAttentionConfig(source_layer=1, dim=8))
        >>> ids = tokenizer("France's capital is", return_tensors="pt")["input_ids"]
        >>> with wrapped.attention_maps() as maps:
        ...     logits = wrapped(ids).logits
        >>> maps[1].shape[-2:] == (4, ids.shape[1])  # memory layers, positions
        True
        >>> wrapped.unload() is model
        True
    """

    def __init__(self, model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True):
        arch = describe(model)
        memory = config.memory(len(arch.blocks))
        updates = {layer: BackAttention(arch.width, config) for layer in config.sources}
        super().__init__(model, updates, memory, freeze_base)
        self.back_attention_config = config

    def edited(
        self, cells: Tensor | None = None, memory: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Change what this thread can read while the block runs, to test what is used.

        cells: [B, T, M, S] bool (B and T may be 1): False hides a (memory layer, position) from a
        query. The softmax goes over the others, and a query that may read none gets no update. S
        counts the positions in a cache too. memory: [M, B, S, D], states to be read instead of the
        first pass's; not with a cache.

        Raises ValueError for another shape, here or when the model is called.
        """
        count, width = len(self.memory_layers), self._arch.width
        if cells is not None and (cells.dim() != 4 or cells.shape[2] != count):
            raise ValueError(
                f"cells must be [batch, queries, {count} memory layers, positions], "
                f"not {list(cells.shape)}."
            )
        if memory is not None and (memory.dim() != 4 or memory.shape[::3] != (count, width)):
            raise ValueError(
                f"memory must be [{count} memory layers, batch, positions, width {width}], "
                f"not {list(memory.shape)}."
            )
        return self._asked(cells=cells, memory=memory)

    @contextlib.contextmanager
    def attention_maps(self) -> Iterator[dict[int, Tensor]]:
        """Record the weights of this thread's latest forward pass while the block runs.

        Yields source layer -> [B, H, T, M, S], see `BackAttention.weights`.
        """
        maps: dict[int, Tensor] = {}
        with self._asked(maps=maps):
            yield maps

    def _about(self) -> dict:
        return saving.about(self.base_model, asdict(self.back_attention_config))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT does; other files stay.

        The config names the base model and holds a fingerprint of it, checked on load. dtype: of
        the file, for example torch.float16; None keeps the adapter's. A base model that was trained
        too is saved on its own.
        """
        saving.write(folder, self._about(), self.adapter_state(), dtype)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None, **options
    ) -> str:
        """What `save_pretrained` writes, and a card, to a Hugging Face repository of its own.

        options: of `HfApi.upload_folder`, such as revision or commit_message. Returns the commit's
        address.
        """
        from huggingface_hub import HfApi

        api, options = HfApi(token=token), {"commit_message": "Upload adapter", **options}
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = saving.card(self.base_model.config.name_or_path, repo_id)
            Path(folder, "README.md").write_text(card, encoding="utf-8")
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> "BackAttentionModel":
        """Put a saved adapter on its base model.

        folder: a local folder, also a checkpoint of Trainer's, or a Hugging Face id. Warns where
        the model was fine-tuned since. Raises AdapterError when the adapter is not there, is no
        back attention, is damaged, or was trained on another base model.
        """
        options, weights = saving.read(folder, model)
        try:
            wrapped = cls(model, BackAttentionConfig.from_dict(options))
        except (TypeError, ValueError) as error:
            raise saving.AdapterError(f"{folder} does not fit this model: {error}") from error
        expected = wrapped.adapter_state()
        wrong = sorted({*expected} ^ {*weights}) or [
            name
            for name, tensor in sorted(weights.items())
            if tensor.shape != expected[name].shape or not tensor.isfinite().all()
        ]
        if wrong:
            wrapped.unload()
            raise saving.AdapterError(
                f"{folder}: {wrong[0]} is missing, unknown, misshapen or not finite."
            )
        for name, tensor in expected.items():
            tensor.copy_(weights[name])
        return wrapped

    def get_extra_state(self) -> Tensor:
        """What else a state dict needs to be loaded: the config and the base's fingerprint."""
        packed = zlib.compress(json.dumps(self._about()).encode())
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError for a state dict of another config, AdapterError for another base's."""
        known = saving.from_tensor(state)
        if BackAttentionConfig.from_dict(known) != self.back_attention_config:
            raise ValueError(
                f"This state dict is of {BackAttentionConfig.from_dict(known)}, not of "
                f"{self.back_attention_config}."
            )
        if not any(p.requires_grad for p in self.base_model.parameters()):
            saving.check_base(known, self.base_model, "This state dict")


def get_back_attention_model(
    model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True
) -> BackAttentionModel:
    """Put untrained back attention on a Hugging Face decoder; it then changes nothing at first.

    model: any supported decoder with its language-model head (see `backattn.models.families`); the
    adapter is fp32 whatever that is. freeze_base: False trains the model's weights too (from
    scratch). Draws the projections' weights from torch's generator.

    Raises UnsupportedModelError for another family, ValueError for layers that the model does not
    have and for a model that carries an adapter already.

    Example:
        >>> wrapped = get_back_attention_model(model, BackAttentionConfig(source_layer=1, dim=8))
        >>> wrapped.trainable()[0] == 4 * 32 * 8
        True
    """
    return BackAttentionModel(model, config, freeze_base)
