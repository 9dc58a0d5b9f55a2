"""twilight::decode_attention against the dense attention PyTorch offers, in one run."""

from __future__ import annotations

import argparse
from functools import partial

import runner
import torch
from peers import peers_on
from runner import Method
from timing import decode_bytes
from workload import Workload, budget_means

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig, decode_step
from twilight_ops.config import DENSE_BELOW

NOTES = (
    "x best dense: how many times as fast as the fastest dense peer of this run. MB: the least the method must read. I0, I1: candidates "
    "and kept tokens a KV head; mass: true attention mass of the kept tokens, mean over query heads, from the difference of the exact lse."
)


def configurations(data: Workload, options: argparse.Namespace) -> dict[str, TwilightConfig]:
    """Twilight's contenders; `dense_below` as shipped unless asked otherwise."""
    common = {"top_p": options.top_p, "page_size": data.sizes.page_size, "dense_layers": 0, "dense_below": options.dense_below}
    prefix = data.prefix_channels
    return {
        "twilight_dense": TwilightConfig(**(common | {"dense_layers": len(data.queries)})),
        "twilight_quest": TwilightConfig(selector=Quest(token_budget=options.token_budget), **common),
        "twilight_shadow_prefix": TwilightConfig(
            selector=ShadowPrefix(token_budget=options.token_budget, budget_fraction=0.0, prefix_channels=prefix), **common
        ),
        "twilight_shadow_prefix_eighth": TwilightConfig(
            selector=ShadowPrefix(token_budget=512, budget_fraction=0.125, prefix_channels=prefix), **common
        ),
        "twilight_full": TwilightConfig(selector=Full(), **common),
    }


def twilight_method(data: Workload, name: str, config: TwilightConfig, exact_lse: torch.Tensor) -> Method:
    layers = data.layers(config)
    plan, paging = layers[0].plan, data.paging
    calls = [partial(decode_step.attend, q, layer, *paging, data.sm_scale) for q, layer in zip(data.queries, layers, strict=True)]

    def report() -> tuple[int, dict]:
        candidates, kept = budget_means(layers)
        _, lse = calls[0]()
        dense = plan.selector is None or data.sizes.length <= plan.dense_below
        selector = "dense" if dense else plan.selector.kernel
        columns = {
            "candidates": round(candidates, 1),
            "kept_tokens": round(kept, 1),
            "captured_mass": round((lse - exact_lse).exp().mean().item(), 5),
            "takes_dense_path": dense,
        }
        return decode_bytes(data.sizes, selector, candidates, kept, data.prefix_channels, plan.prunes), columns

    settings = {"dense_below": plan.dense_below, "top_p": plan.top_p}
    if plan.selector is not None:
        settings |= {"token_budget": plan.selector.token_budget, "budget_fraction": plan.selector.budget_fraction}
    return Method(name, calls, report, settings=settings)


def methods(data: Workload, options: argparse.Namespace) -> list[Method]:
    """Dense peers and Twilight's configurations; every exact one must agree with the first peer before anything is timed."""
    sizes = data.sizes
    copies = data.dense_copies()
    found = []
    for peer in peers_on(options.device):
        sets = [(q, k, v, data.sm_scale) for q, (k, v) in zip(data.queries, copies, strict=True)]
        method = runner.method_of(peer.name, peer.attend, sets, sizes.kv_bytes, kept_tokens=float(sizes.length), captured_mass=1.0)
        method.dense_peer = True
        found.append(method)
    expected = found[0].calls[0]().float()
    exact = None
    for name, config in configurations(data, options).items():
        if exact is None:  # the first configuration is the dense one
            dense = twilight_method(data, name, config, torch.zeros(()))
            out, exact = dense.calls[0]()
            error = (out.float() - expected).abs().max().item()
            if error > 0.02 * expected.abs().max().item():
                raise SystemExit(f"{name} differs from {found[0].name} by {error:.3g}: nothing is timed while results are wrong")
        found.append(twilight_method(data, name, config, exact))
    return found


if __name__ == "__main__":
    cli = runner.parser(__doc__, lengths=(1024, 32768))
    cli.add_argument(
        "--dense-below",
        type=int,
        default=None,
        help=f"tokens up to which Twilight attends to everything; default: as shipped, {dict(DENSE_BELOW)}",
    )
    runner.main(cli.parse_args(), methods, NOTES)
