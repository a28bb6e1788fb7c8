"""A GGUF file once turned into an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from care_mla.errors import CheckpointError
from care_mla.files import writing


def require_gguf(file: Path) -> None:
    """
    Raises:
        CheckpointError: no such file, or nothing installed that reads it.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    try:
        import accelerate  # noqa: F401  (transformers needs both)
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "reading a GGUF file needs the packages gguf and accelerate: pip install 'care-mla[gguf]'"
        ) from error


def gguf_to_directory(file: Path, directory: Path) -> None:
    """Dequantize a GGUF model to float32 safetensors with its config and tokenizer, into an existing directory.

    Raises:
        CheckpointError: not a GGUF that transformers reads, or a directory that cannot be written.
    """
    try:
        quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read as a GGUF model: {str(error).strip().splitlines()[0]}") from error
    # transformers refuses to save a model that remembers GGUF: rebuild it from a config that does not.
    config = quantized.config
    del config.quantization_config
    if hasattr(config, "rms_norm_eps"):  # GGUF keeps it in float32: 9.999999747e-06 was written as 1e-05
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    config.name_or_path = file.stem
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    with writing(directory):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
