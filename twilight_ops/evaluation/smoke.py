"""What CI evaluates: two minutes on two cores, which fail when a default has become worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Arguments of `python -m twilight_ops eval`. Two documents of the package, one of ours and one classic, because they differ most.
SETTINGS = {
    "tasks": ["language", "passkey"],
    "lengths": [2048],
    "depths": [0.5],
    "limit": 1,
    "methods": ["full:.95", "shadow_prefix:.95", "quest:n/4:.95"],
    "tokens": 32,
    "greedy_tokens": 0,
    "mass_steps": 4,
    "only_pruned": True,
    "no_equal_tokens": True,
}
DOCUMENTS = ("lighthouse.txt", "moby_dick.txt")


@dataclass(frozen=True)
class Limits:
    """What a method may not exceed or fall below."""

    kl: float
    worst_kl: float
    bytes_share: float
    mass_mean: float
    passkey: float  # score, relative to dense


LIMITS: dict[str, Limits] = {}


def failures(rows: Sequence[dict]) -> list[str]:
    """What is worse than it may be, one line each; a method that did not run is."""
    found = []
    for setting, limits in LIMITS.items():
        by_task = {row["task"]: row for row in rows if row["setting"] == setting}
        dense = {row["task"]: row for row in rows if row["setting"] == "dense"}
        language, passkey = by_task.get("language"), by_task.get("passkey")
        if language is None or passkey is None:
            found.append(f"{setting}: expected a result, got none")
            continue
        for name in ("kl", "worst_kl", "bytes_share"):
            if not language[name] <= getattr(limits, name):
                found.append(f"{setting}: {name}: expected at most {getattr(limits, name):g}, got {language[name]:.5f}")
        if not language["mass_mean"] >= limits.mass_mean:
            found.append(f"{setting}: mass_mean: expected at least {limits.mass_mean:g}, got {language['mass_mean']:.5f}")
        if not passkey["score"] >= limits.passkey * dense["passkey"]["score"]:
            found.append(f"{setting}: passkey: expected dense attention's score, {dense['passkey']['score']:g}, got {passkey['score']:g}")
    return found
