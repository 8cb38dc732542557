"""MoE layers with expert loops over data-dependent sizes, after the structure of public code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import sere_compile
from sere_compile import SimilarityProfile
from sere_compile.testing import reroute_oracle

HIDDEN, EXPERTS, TOP_K = 16, 8, 3


class Loop(nn.Module):
    """A softmax router and a list of experts; subclasses dispatch."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)

    def route(self, x):
        weights, ids = torch.topk(self.gate(x).softmax(-1), TOP_K)
        return ids, weights

    def expert(self, number, x):
        return F.silu(self.experts[number](x))

    def expected(self, x, matrix, select_top_k, min_active=TOP_K):
        """The sum over slots of w_k * expert_{new id_k}(x), one slot at a time."""
        rows = x.reshape(-1, HIDDEN)
        ids, weights = self.route(rows)
        ids = reroute_oracle(ids, matrix, select_top_k, 0.0, min_active)
        slots = [
            torch.stack([w * self.expert(e, row) for w, e in zip(ws, es, strict=True)]).sum(0)
            for row, ws, es in zip(rows, weights, ids.tolist(), strict=True)
        ]
        return torch.stack(slots).view(x.shape)


class MaskLoop(Loop):
    """As litgpt: a loop over masks, in which Dynamo breaks, so that it skips the frame, gate included."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        masks = (ids.unsqueeze(-1) == torch.arange(EXPERTS)).permute(2, 0, 1)
        y = torch.zeros_like(rows)
        for mask, expert in zip(masks, self.experts, strict=True):
            token, slot = torch.where(mask)
            y[token] += weights[token, slot, None] * F.silu(expert(rows[token]))
        return y.view(x.shape)


class CountLoop(Loop):
    """As DeepSeek's reference code: experts without tokens are left out by a Python comparison, a graph break that
    dynamic-shape capture turns into an error."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        ids, weights = self.route(rows)
        y = torch.zeros_like(rows)
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
        for number in range(EXPERTS):
            if counts[number] == 0:
                continue
            token, slot = torch.where(ids == number)
            y[token] += self.expert(number, rows[token]) * weights[token, slot, None]
        return y.view(x.shape)


class SortedLoop(Loop):
    """As DeepSeek's code for inference: rows sorted by expert, split by counts; capture skips its frame."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        counts = ids.new_zeros(len(ids), EXPERTS).scatter_(1, ids, 1).sum(0)
        order = ids.view(-1).argsort()
        ordered = rows[order // TOP_K]
        outputs, start = [], 0
        for number, count in enumerate(counts.tolist()):
            end = start + count
            if count == 0:
                continue
            outputs.append(F.silu(self.experts[number](ordered[start:end])))
            start = end
        joined = torch.cat(outputs)
        y = torch.empty_like(joined)
        y[order] = joined
        return (y.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1).view(x.shape)


class RowLoop(Loop):
    """As mistral-inference: `out[tokens] += ...` by each expert, softmax over the K chosen scores."""

    def route(self, x):
        scores, ids = torch.topk(self.gate(x), TOP_K)
        return ids, F.softmax(scores, dim=1, dtype=torch.float).to(x.dtype)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        scores, ids = torch.topk(self.gate(rows), TOP_K)
        weights = F.softmax(scores, dim=1, dtype=torch.float).to(x.dtype)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            y[token] += weights[token, slot, None] * F.silu(expert(rows[token]))
        return y.view(x.shape)


def prepared(kind):
    """A model with a profile, its matrix and rows for a call."""
    model = kind().eval().requires_grad_(False)
    half = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1))
    matrix = ((half + half.T) / 2).fill_diagonal_(1.0)
    sere_compile.attach(model, SimilarityProfile({"gate.weight": matrix}))
    return model, matrix, torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
