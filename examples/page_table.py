"""The operators on an engine's own paged cache: sequences come, grow and go, and share one pool. Run: python examples/page_table.py

The engine owns the pool, a table of pages for each sequence, and the lengths. Prints how far each step is from dense attention.
"""

import torch

from twilight_ops import KV, Always, Budget, Paging, Policy, Pruning, Shadow, append_kv, decode_attention

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
HEADS, KV_HEADS, DIM, PAGE, POOL, MOST = 8, 2, 64, 16, 400, 128  # MOST: pages a sequence


def zeros(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


class Engine:
    def __init__(self) -> None:
        self.kv = KV(zeros(POOL, KV_HEADS, PAGE, DIM), zeros(POOL, KV_HEADS, PAGE, DIM))
        codes, scales = zeros(POOL, KV_HEADS, PAGE * DIM // 2, dtype=torch.uint8), zeros(POOL, KV_HEADS, PAGE, 2, dtype=torch.bfloat16)
        order, prefix = torch.arange(DIM, device=DEVICE).int().repeat(KV_HEADS, 1), zeros(KV_HEADS, dtype=torch.int32) + DIM // 2
        self.shadow = Shadow(codes, scales, order, prefix)
        self.free, self.pages, self.lens = list(range(POOL)), {}, {}

    def append(self, sequences: list[str], k: torch.Tensor, v: torch.Tensor) -> Paging:  # k, v: [B, T, Hkv, D]
        for name in sequences:
            self.lens[name] = self.lens.get(name, 0) + k.shape[1]
            owned = self.pages.setdefault(name, [])
            while len(owned) * PAGE < self.lens[name]:
                owned.append(self.free.pop())
        rows = [self.pages[name] + [-1] * (MOST - len(self.pages[name])) for name in sequences]  # -1: no page
        paging = Paging(*(torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (rows, [self.lens[name] for name in sequences])))
        append_kv(k, v, self.kv, paging, shadow=self.shadow)
        return paging

    def finish(self, name: str) -> None:
        self.free += self.pages.pop(name)
        del self.lens[name]


torch.manual_seed(0)
engine, seen = Engine(), {}
policy = Policy("shadow_prefix", Budget(128, 0.125), Pruning(0.95), Always(sink_tokens=16, recent_tokens=64))
for step, batch in enumerate((["a"], ["a", "b"], ["b"], ["b", "c"])):
    for name in set(batch) - seen.keys():  # a prompt, before the sequence decodes
        seen[name] = torch.randn(2, 1, {"a": 700, "b": 1500, "c": 300}[name], KV_HEADS, DIM, device=DEVICE).to(DTYPE)
        engine.append([name], *seen[name])
    k, v = torch.randn(2, len(batch), 1, KV_HEADS, DIM, device=DEVICE).to(DTYPE)
    seen |= {name: torch.cat([seen[name], torch.stack([k, v])[:, i : i + 1]], 2) for i, name in enumerate(batch)}
    # Queries that look for one key each, as those of a model do: most others have little weight.
    q = torch.stack([2 * seen[name][0, 0, -200].repeat_interleave(HEADS // KV_HEADS, 0) for name in batch])[:, None]
    out, _ = decode_attention(q, engine.kv, engine.append(batch, k, v), policy, DIM**-0.5, engine.shadow)
    for i, name in enumerate(batch):
        query, (k, v) = q[i, None].transpose(1, 2), seen[name].transpose(2, 3)
        dense = torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)[0, :, 0]
        print(f"step {step}, {name}: {engine.lens[name]} tokens, off dense by {(out[i, 0] - dense).norm() / dense.norm():.1%}")
    if step == 1:
        engine.finish("a")
