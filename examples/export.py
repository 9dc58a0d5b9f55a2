"""A decode step as a file: torch.export with the cache as buffers, then an AOTInductor package. Run:

    python examples/export.py step.pt2

The package holds weights, cache and prompt, and runs in a process that has torch and one native library of this package, but neither
transformers nor twilight_ops: the second half of this file is such a process. There the library defines the operators, so it is loaded
first and asked to. For other prompts, export the step of a cache that holds them.
"""

import copy
import ctypes
import subprocess
import sys

import torch

PROMPT = 70
NEW_TOKENS = 12


def make_step() -> tuple["Step", torch.Tensor]:
    """A tiny Llama with a prompt in its cache, and its first token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from twilight_ops import ShadowPrefix, TwilightConfig
    from twilight_ops.integration import Decoder, TwilightCache

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = LlamaConfig(vocab_size=99, num_hidden_layers=2, initializer_range=0.2, **sizes)
    config._attn_implementation = "twilight"
    model = LlamaForCausalLM(config).eval()
    twilight = TwilightConfig(ShadowPrefix(token_budget=24), top_p=0.9, dense_below=0, recent_tokens=4, sink_tokens=2)
    cache = TwilightCache(config, twilight, max_cache_len=128, device="cpu", dtype=torch.float32)
    logits = Decoder(model, cache, capture="eager").prefill(torch.randint(1, 99, (1, PROMPT)))
    return Step(model, cache), logits.argmax(-1, keepdim=True)


def export(path: str) -> tuple[int, list[int]]:
    """Packages a step; returns the first token and those that the step generates eagerly."""
    step, first = make_step()
    with torch.no_grad():
        program = torch.export.export(step, (first, torch.tensor([[PROMPT]])), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        return int(first), tokens_of(step, first)


class Step(torch.nn.Module):
    """One decode step of a model; the cache's tensors are its buffers, and it writes no others."""

    def __init__(self, model, cache):
        from twilight_ops.integration import cache_argument

        super().__init__()
        self.model, self.cache = model, cache
        (self.name,) = cache_argument(model, cache)  # of the cache among the model's arguments
        self.tensors = cache.tensors()
        for index, tensor in enumerate(self.tensors):
            # Inductor takes lengths of up to 8 sequences for numbers that never change, unless they have two dimensions.
            self.register_buffer(f"cache_{index}", tensor if tensor.dim() > 1 else tensor.view(1, -1))

    def forward(self, token, position):
        """The next token [B, 1] after `token` [B, 1] at `position` [B, 1], int64."""
        # A trace sees buffers as other tensors, so it gets a cache of those.
        memo = {id(tensor): getattr(self, f"cache_{index}").view(tensor.shape) for index, tensor in enumerate(self.tensors)}
        cache = copy.deepcopy(self.cache, memo)
        return self.model(input_ids=token, position_ids=position, **{self.name: cache}, use_cache=True).logits.argmax(-1)


def tokens_of(step, token) -> list[int]:
    found = []
    for position in range(PROMPT, PROMPT + NEW_TOKENS):
        token = step(token, torch.tensor([[position]]))
        found.append(int(token))
    return found


def run(path: str, library: str, first: str) -> None:
    """What needs torch alone."""
    torch.ops.load_library(library)
    assert ctypes.CDLL(library).twilight_define_schemas()
    print(tokens_of(torch._inductor.aoti_load_package(path), torch.tensor([[int(first)]])))
    assert not {"transformers", "twilight_ops"} & sys.modules.keys()


if __name__ == "__main__":
    if len(sys.argv) == 4:
        run(*sys.argv[1:])
    else:
        from twilight_ops.native_modules import library

        first, expected = export(sys.argv[1])
        print("eager  ", expected)
        command = [sys.executable, __file__, sys.argv[1], library(), str(first)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print("package", found, end="")
        assert found == f"{expected}\n"
