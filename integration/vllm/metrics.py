"""What was kept, as log lines and by layer."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from twilight_ops.layer import PagedKVLayer
from twilight_ops.report import BudgetReport, BudgetWindows, budget_report

logger = init_logger(f"vllm.{__name__}")


def layers_of(vllm_config: Any, names: list[str] | None = None) -> list[PagedKVLayer]:
    """This process's layers that have a cache, in the model's order."""
    context = vllm_config.compilation_config.static_forward_context
    impls = (getattr(context[name], "impl", None) for name in (context if names is None else names))
    paged = [layer for impl in impls if (layer := getattr(impl, "paged", None)) is not None]
    return sorted(paged, key=lambda layer: layer.index)


class LogLines:
    """A log line every `every` steps: tokens kept, share pruned, share of calls that were dense; 0 logs none.

    The heads of the first rank speak for all.
    """

    def __init__(self, vllm_config: Any, layer_names: list[str], every: int) -> None:
        self.vllm_config, self.layer_names, self.every = vllm_config, layer_names, every
        self.windows: BudgetWindows | None = None
        self.stale = True  # the counters hold dummy runs, or there are none yet

    def forget(self) -> None:
        """What is counted until the next step comes from dummy runs, such as those that graphs are captured from."""
        self.stale = True

    def step(self) -> None:
        """Call before each step."""
        if self.stale:
            layers = layers_of(self.vllm_config, self.layer_names)
            for layer in layers:
                layer.budget_counters.zero_()
            self.stale = not layers
            self.windows = None
            if layers and self.every and get_tensor_model_parallel_rank() == 0:
                self.windows = BudgetWindows(layers, self.every, self._write)
        elif self.windows is not None:
            self.windows.advance()

    def _write(self, window: int, steps: tuple[int, int], report: BudgetReport) -> None:
        if report.sparse is not None:
            logger.info("twilight: steps %d to %d: %s", *steps, report.summary)


class BudgetReports:
    """Methods for vLLM's workers: `--worker-extension-cls twilight_ops.integration.vllm.metrics.BudgetReports`, then
    `llm.collective_rpc("twilight_budget_report")`, one answer a rank."""

    vllm_config: Any

    def twilight_budget_report(self) -> dict[str, Any]:
        """`BudgetReport.to_dict()` of this rank's layers and heads, and its table as "text"."""
        report = budget_report(layers_of(self.vllm_config))
        return {**report.to_dict(), "text": str(report)}

    def twilight_reset_budget(self) -> None:
        """Starts the counters again."""
        for layer in layers_of(self.vllm_config):
            layer.budget_counters.zero_()

    def twilight_prefix_channels(self) -> list[list[int] | None]:
        """Channels that select, by layer and KV head of this rank; None for layers without a shadow."""
        layers = layers_of(self.vllm_config)
        return [None if layer.shadow is None else layer.shadow.prefix_channels.tolist() for layer in layers]
