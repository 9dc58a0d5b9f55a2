"""A decode step's attention over 32,768 cached tokens: pruned, and dense by the same kernel. Run: kernels benchmark REPO_ID"""

import torch
from kernels.benchmark import Benchmark


class TwilightOpsBenchmark(Benchmark):
    seed = 0
    tokens, num_qo_heads, num_kv_heads, head_dim, page_size = 32_768, 32, 8, 128, 16

    def setup(self) -> None:
        ops, dtype = self.kernel, torch.bfloat16 if self.device == "cuda" else torch.float32
        pages, heads, dim = self.tokens // self.page_size, self.num_kv_heads, self.head_dim

        def zeros(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.kv = ops.KV(*(zeros(pages, heads, self.page_size, dim) for _ in range(2)))
        order = torch.arange(dim, dtype=torch.int32, device=self.device).repeat(heads, 1)
        self.shadow = ops.Shadow(
            zeros(pages, heads, self.page_size * dim // 2, dtype=torch.uint8),
            zeros(pages, heads, self.page_size, 2, dtype=torch.bfloat16),
            order,
            torch.full((heads,), dim // 4, dtype=torch.int32, device=self.device),
        )
        table = torch.randperm(pages, device=self.device).int().view(1, -1)
        self.paging = ops.Paging(table, torch.tensor([self.tokens], dtype=torch.int32, device=self.device))
        self.k, self.v = torch.randn(2, 1, self.tokens, heads, dim, device=self.device).to(dtype)
        ops.append_kv(self.k, self.v, self.kv, self.paging, shadow=self.shadow)
        self.q = (4 * torch.randn(1, 1, self.num_qo_heads, dim, device=self.device)).to(dtype)
        always = ops.Always(sink_tokens=16, recent_tokens=64)
        self.sparse = ops.Policy("shadow_prefix", ops.Budget(token_budget=768, budget_fraction=0.125), ops.Pruning(top_p=0.95), always)
        self.dense = self.sparse._replace(dense_below=self.tokens)

    def attend(self, policy) -> torch.Tensor:
        return self.kernel.decode_attention(self.q, self.kv, self.paging, policy, self.head_dim**-0.5, self.shadow)[0]

    def benchmark_pruned(self) -> None:
        self.out = self.attend(self.sparse)

    def benchmark_dense(self) -> None:
        self.out = self.attend(self.dense)

    def verify_dense(self) -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (self.q, self.k, self.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
