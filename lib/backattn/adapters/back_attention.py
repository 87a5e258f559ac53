"""Back attention: a low layer attends to the high layers' states, and the upper layers run again.

State h_t enters layer t; h_L, with L layers, enters the final norm. The equation and the forward
pass are in `Call.second_pass` (paper, section 5). Our reading, where the paper is silent, and an
option: one softmax over all (layer, position) pairs, and N, an RMS norm without weights, in front
of the projections, because raw high-layer states hold a few huge entries.
"""

import contextlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backattn.adapters import saving
from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import BackAttention
from backattn.adapters.two_pass import TwoPassModel
from backattn.files import atomic_file
from backattn.models.decoder import describe


class BackAttentionModel(TwoPassModel):
    """A decoder with back attention; by `get_back_attention_model` or `from_pretrained`.

    one_pass: set it to True for a cheaper `generate` (our variant). The prompt has two passes as
    before, a new token one: at the source layer it reads the memory of earlier tokens only, and
    goes on up from there, attending to their second pass. Its states of that go into memory.

    transformers' `pipeline` knows its own classes only: give it `base_model`, within `applied()`.

    Example:
        >>> wrapped = get_back_attention_model(model, BackAttentionConfig(source_layer=1, dim=8))
        >>> with wrapped.attention_maps() as maps:
        ...     logits = wrapped(**encode(tokenizer, ["France's capital is"]).inputs).logits
        >>> maps[1].shape[-2:], wrapped.unload() is model  # memory layers, positions
        (torch.Size([4, 5]), True)
    """

    def __init__(self, model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True):
        arch = describe(model)
        memory = config.memory(len(arch.blocks))
        updates = {layer: BackAttention(arch.width, config) for layer in config.sources}
        super().__init__(model, updates, memory, freeze_base)
        self.back_attention_config = config

    @contextlib.contextmanager
    def attention_maps(self) -> Iterator[dict[int, Tensor]]:
        """Yields source layer -> [B, H, T, M, S], the weights of this thread's latest forward pass
        in the block, see `BackAttention.weights`."""
        maps: dict[int, Tensor] = {}
        with self._asked(maps=maps):
            yield maps

    def _about(self) -> dict:
        return saving.about(self.base_model, asdict(self.back_attention_config))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT does; a base model that
        was trained too is saved on its own, and other files stay. dtype: of the file."""
        state = {saving.PREFIX + name: p for name, p in self.adapter_state().items()}
        tensors = {name: p.to(dtype or p.dtype).cpu().contiguous() for name, p in state.items()}
        with atomic_file(Path(folder) / saving.WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary)
        with atomic_file(Path(folder) / saving.CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(self._about(), indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, repo_id: str, private=None, token=None, **options) -> str:
        """Put what `save_pretrained` writes, and a card, on the Hugging Face hub; returns the
        commit's address. options: of `HfApi.upload_folder`."""
        from huggingface_hub import HfApi

        api, options = HfApi(token=token), {"commit_message": "Upload adapter", **options}
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = saving.card(self.base_model.config.name_or_path, repo_id) + self._card()
            Path(folder, "README.md").write_text(card, encoding="utf-8")
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)

    def _card(self) -> str:
        """What a card says of this adapter, and what its author must add."""
        count = sum(p.numel() for p in self.adapter_state().values())
        options = {**asdict(self.back_attention_config), "weights": f"{count:,}"}
        rows = "".join(f"| {name} | {value} |\n" for name, value in options.items())
        say = "To be added: what it was trained on, how it was tested, its licence."
        return f"\n| option | value |\n|---|---|\n{rows}\n{say}\n"

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | Path, revision: str | None = None, token=None
    ) -> "BackAttentionModel":
        """Put a saved adapter on its base model.

        folder: local, also a checkpoint of Trainer's, or a Hugging Face id, of which revision and
        token are. Warns where the model was fine-tuned since. Raises AdapterError when the adapter
        is not there, is no back attention, is damaged, or was trained on another base model.
        """
        options, weights = saving.read(folder, model, revision=revision, token=token)
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
            problem = f"{wrong[0]} is missing, unknown, misshapen or not finite"
            raise saving.AdapterError(f"{folder}: {problem}.")
        for name, tensor in expected.items():
            tensor.copy_(weights[name])
        return wrapped

    def get_extra_state(self) -> Tensor:
        """What else a state dict needs to be loaded: the config and the base's fingerprint."""
        packed = zlib.compress(json.dumps(self._about()).encode())
        return torch.tensor([*packed], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError for a state dict of another config, AdapterError for another base's."""
        known = saving.unpack(state)
        config = BackAttentionConfig.from_dict(known)
        if config != self.back_attention_config:
            raise ValueError(f"This state dict is of {config}, not {self.back_attention_config}.")
        if self.frozen:
            saving.check_base(known, self.base_model, "This state dict")


def get_back_attention_model(
    model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True
) -> BackAttentionModel:
    """Put untrained back attention on a Hugging Face decoder; it then changes nothing at first.

    model: any supported decoder with its language-model head (see `backattn.models.families`); the
    adapter is fp32 whatever that is. freeze_base: False trains the model's weights too. Draws
    weights from torch's generator. Raises UnsupportedModelError for another family, ValueError for
    layers that the model does not have, and for one that carries another adapter unless its weights
    stay frozen.

    Example:
        >>> wrapped = get_back_attention_model(model, BackAttentionConfig(source_layer=1, dim=8))
        >>> wrapped.trainable()[0] == 4 * 32 * 8
        True
    """
    return BackAttentionModel(model, config, freeze_base)
