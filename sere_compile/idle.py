"""Options that cannot act on a gate, said once: a larger S than K, and a threshold that no similarity reaches."""

from __future__ import annotations

import logging
import threading

import torch

from .config import SereConfig

log = logging.getLogger(__name__)


def too_many_primary(config: SereConfig, top_k: int) -> str:
    """Why `select_top_k` cannot act on a gate with K = `top_k`; empty where it can, and where it is K."""
    wanted = config.select_top_k
    if not isinstance(wanted, int) or wanted <= top_k:
        return ""
    return f"select_top_k={wanted} is more than K = {top_k}: every expert of a token stays, nothing is re-routed"


def never_reached(threshold: float | str, similarity: torch.Tensor) -> str:
    """Why a threshold leaves nothing to re-route in a gate with this similarity [E, E]; empty where it does."""
    if isinstance(threshold, str) or threshold <= 0 or len(similarity) < 2:
        return ""
    most = similarity.detach().float().cpu().clone().fill_diagonal_(float("-inf")).max().item()
    if most >= threshold:
        return ""
    return (
        f"threshold={threshold:g} is above every similarity, at most {most:.3g}: all experts stay, nothing is re-routed"
    )


class _Once:
    """Warnings that a process gives once, whichever gate or thread comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def __call__(self, gate: str, why: str) -> None:
        if not why:
            return
        kind = why.partition(" is ")[0]
        with self._lock:
            if kind in self._told:
                return
            self._told.add(kind)
        log.warning("%s: %s", gate, why)

    def reset(self) -> None:
        """Say them again the next time."""
        self._told.clear()


tell_once = _Once()
