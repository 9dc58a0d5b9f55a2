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

NEW_TOKENS = 12


def make_step() -> "Step":
    """A tiny Llama with a prompt in its cache."""
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
    prompt = torch.randint(1, 99, (1, 70))
    return Step(model, cache, Decoder(model, cache, capture="eager").prefill(prompt).argmax(-1, keepdim=True))


def export(path: str) -> list[int]:
    """Packages a step; returns the tokens that it generates eagerly."""
    step = make_step()
    with torch.no_grad():
        program = torch.export.export(step, (), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        return [int(step()) for _ in range(NEW_TOKENS)]


class Step(torch.nn.Module):
    """Feeds the last token to the model and returns the next, [B, 1]; all that it writes is a buffer."""

    def __init__(self, model, cache, token):
        super().__init__()
        self.model, self.cache = model, cache
        self.register_buffer("token", token.clone())
        self.tensors = cache.tensors()
        for index, tensor in enumerate(self.tensors):
            self.register_buffer(f"cache_{index}", tensor)

    def forward(self):
        # A trace sees buffers as other tensors, so it gets a cache of those.
        memo = {id(tensor): getattr(self, f"cache_{index}") for index, tensor in enumerate(self.tensors)}
        cache = copy.deepcopy(self.cache, memo)
        position = cache.live_seq_lens[:, None].long()
        logits = self.model(input_ids=self.token, position_ids=position, past_key_values=cache, use_cache=True).logits
        self.token.copy_(logits.argmax(-1))
        return self.token.clone()


def run(path: str, library: str) -> None:
    """What needs torch alone."""
    torch.ops.load_library(library)
    assert ctypes.CDLL(library).twilight_define_schemas()
    step = torch._inductor.aoti_load_package(path)
    print([int(step()) for _ in range(NEW_TOKENS)])
    assert not {"transformers", "twilight_ops"} & sys.modules.keys()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run(*sys.argv[1:])
    else:
        from twilight_ops.native_modules import library

        expected = export(sys.argv[1])
        print("eager  ", expected)
        command = [sys.executable, __file__, sys.argv[1], library()]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print("package", found, end="")
        assert found == f"{expected}\n"
