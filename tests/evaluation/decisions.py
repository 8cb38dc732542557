"""Random decisions of one gate."""

from __future__ import annotations

import torch

from sere_compile.evaluation import RoutingBatch

P, B, E, K = 7, 5, 12, 4


def decisions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(P, B, E, generator=generator).mul(2).softmax(-1)
    weights, ids = scores.topk(K, dim=-1)
    return RoutingBatch("gate", ids, weights, scores, torch.ones(P, B, dtype=torch.bool))


def matrices(seed=1):
    half = torch.rand(E, E, generator=torch.Generator().manual_seed(seed))
    return {"gate": ((half + half.T) / 2).fill_diagonal_(1)}


def gram_of(outputs):
    return {"gate": outputs @ outputs.T}


OUTPUTS_GRAM = gram_of(torch.randn(E, 20, generator=torch.Generator().manual_seed(4)))
