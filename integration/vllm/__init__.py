"""vLLM: Select-then-Prune attention as the backend CUSTOM, which `--attention-backend CUSTOM` chooses. docs/serving.md says how.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`.
"""


def register() -> None:
    """Makes CUSTOM this package's backend. Nothing else changes; an unsupported vLLM is refused where CUSTOM is asked for."""
    from .versions import register_backend

    register_backend()
