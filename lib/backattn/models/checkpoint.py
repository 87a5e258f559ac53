"""Loading checked weights from a folder or a hub."""

import contextlib
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

MEMORY_SHARE = 0.8  # share of the free memory that weights may take


class ModelLoadError(OSError):
    """A model could not be fetched, verified or read. The message says what to do."""


def one_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto": a GPU where there is one."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _load_folder(folder: Path, dtype: torch.dtype):
    with _quiet_transformers():
        return _whole_model(str(folder), dtype), AutoTokenizer.from_pretrained(folder)


def _whole_model(name: str, dtype: torch.dtype, **options):
    """The model with all its weights from the file; transformers alone would make up missing ones and only log it."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except RuntimeError as error:
        raise ModelLoadError(
            f"The weights of {name!r} do not fit its config.json: {error}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelLoadError(
            f"The weight file of {name!r} lacks {len(missing)} tensors ({missing[0]} …). Fetch the whole file again."
        )
    return model


@contextlib.contextmanager
def _quiet_transformers():
    """No bars and no advice from transformers while we show our own; its settings return afterwards.

    Its GGUF reader takes its bar from tqdm, past those settings; in a notebook that bar is an output of the cell.
    """
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with mock.patch.object(
            modeling_gguf_pytorch_utils, "tqdm", partial(tqdm, disable=True), create=True
        ):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def weight_bytes(config, dtype: torch.dtype) -> int:
    """What the weights of a model of this configuration take."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters())
