"""Whether a result can be right: nothing is timed before it passes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .timing import tensors_of

# Largest error of an exact method, as a share of the largest output: outputs are rounded to bf16.
EXACT_TOLERANCE = 0.02
# A sparse method that captures this much less than it was asked for is broken, not approximate.
# Quest with 8192 of 131072 tokens and concentrated logits (--spread 4) has been seen to miss 0.27.
MASS_TOLERANCE = 0.4
LSE_TOLERANCE = 0.05  # natural-log units by which bf16 keys may raise the lse above the exact one


def exact_check(expected: Tensor) -> Callable[[object], str | None]:
    """Refuses an output that is not exact attention."""

    def check(output: object) -> str | None:
        out = tensors_of(output)[0].float()
        error, limit = (out - expected).abs().max().item(), EXACT_TOLERANCE * expected.abs().max().item()
        return None if error <= limit else f"differs from exact attention by {error:.3g}, allowed are {limit:.3g}"

    return check


def captured_mass(lse: Tensor, exact_lse: Tensor) -> float:
    return (lse - exact_lse).exp().mean().item()


def sparse_check(exact_lse: Tensor, top_p: float) -> Callable[[object], str | None]:
    """Refuses an output that attention over a set of about `top_p` of the mass cannot have."""

    def check(output: object) -> str | None:
        out, lse = tensors_of(output)
        if not out.isfinite().all():
            return "its output is not finite"
        if not (lse <= exact_lse + LSE_TOLERANCE).all():
            return f"its lse exceeds the exact one by {(lse - exact_lse).max().item():.3g}"
        mass = captured_mass(lse, exact_lse)
        return None if mass >= top_p - MASS_TOLERANCE else f"it captures only {mass:.3f} of the attention mass"

    return check
