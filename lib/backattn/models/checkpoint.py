"""Reading checked weights from a folder or a hub."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging


class ModelLoadError(OSError):
    """A model could not be fetched, verified or read. The message says what to do."""


def read_checkpoint(name: str, dtype: torch.dtype, revision: str | None = None, **options):
    """(model, tokenizer), all weights from the file: transformers only logs those it makes up.

    Raises ModelLoadError where weights are missing or do not fit the configuration.
    """
    source = {"revision": revision, "trust_remote_code": False}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **source, **options
        )
    except RuntimeError as error:
        raise ModelLoadError(
            f"The weights of {name!r} do not fit its config.json: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(
            f"The weight file of {name!r} lacks {len(missing)} tensors ({missing[0]} …). "
            "Fetch the whole file again."
        )
    return model, AutoTokenizer.from_pretrained(name, **source)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no advice from transformers while we show our own; then as it was."""
    # The GGUF reader's bar is tqdm's own, which no switch turns off: give it the one that obeys.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
