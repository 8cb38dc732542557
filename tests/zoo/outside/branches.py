"""MoE layers whose loop over experts branches on data, which no graph holds, after the structure of public code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.testing import reroute_oracle

from .loops import EXPERTS, HIDDEN, TOP_K, Loop


class AnyLoop(Loop):
    """As minimind: an expert that a mask of any slot names gets its tokens, and the weights that the mask picks."""

    def route(self, x):
        weights, ids = torch.topk(self.gate(x).softmax(-1), TOP_K)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        scores = self.gate(rows).softmax(-1)
        weights, ids = torch.topk(scores, TOP_K, sorted=False)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mask = ids == number
            if mask.any():
                token = mask.any(-1).nonzero().flatten()
                y.index_add_(0, token, F.silu(expert(rows[token])) * weights[mask].view(-1, 1))
        self.loss = scores.new_zeros(())
        return y.view(x.shape)


class NamedLoop(Loop):
    """Experts that no slot names are passed over, each step of the loop beginning with that."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            if not (ids == number).any():
                continue
            token, slot = torch.where(ids == number)
            y[token] += F.silu(expert(rows[token])) * weights[token, slot, None]
        return y.view(x.shape)


class EmptyLoop(Loop):
    """As copies of Mixtral's block: a mask by expert, and no step where no token is left."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        masks = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        y = torch.zeros_like(rows)
        for number in range(EXPERTS):
            slot, token = torch.where(masks[number])
            if token.numel() == 0:
                continue
            y.index_add_(0, token, F.silu(self.experts[number](rows[token])) * weights[token, slot, None])
        return y.view(x.shape)


class TruthLoop(Loop):
    """As `EmptyLoop`, by the truth of a count: capture raises there, and the way without it is taken."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if token.numel():
                y.index_add_(0, token, F.silu(expert(rows[token])) * weights[token, slot, None])
        return y.view(x.shape)


class ItemLoop(Loop):
    """The number of an expert's slots is read from a tensor in each step."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            count = (ids == number).sum().item()
            if count > 0:
                token, slot = torch.where(ids == number)
                y[token] += F.silu(expert(rows[token])) * weights[token, slot, None]
        return y.view(x.shape)


class ListLoop(Loop):
    """The experts that were named, as numbers of a list; a `while` over them."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        left = ids.unique().tolist()
        while left:
            number = left.pop()
            token, slot = torch.where(ids == number)
            y[token] += F.silu(self.experts[number](rows[token])) * weights[token, slot, None]
        return y.view(x.shape)


class TokenLoop(Loop):
    """A loop over tokens: each one's ids are read as numbers."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = []
        for row, chosen, weight in zip(rows, ids, weights, strict=True):
            y.append(sum(w * self.expert(int(e), row) for e, w in zip(chosen, weight, strict=True)))
        return torch.stack(y).view(x.shape)


class SequenceLoop(Loop):
    """As Kowsher's block for sequences: one choice for all tokens of a sequence, by their mean."""

    def forward(self, x):
        weights, ids = torch.topk(self.gate(x.mean(1)).softmax(-1), TOP_K)
        masks = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        y = torch.zeros_like(x)
        for number in range(EXPERTS):
            slot, sequence = torch.where(masks[number])
            if sequence.shape[0] == 0:
                continue
            y.index_add_(0, sequence, F.silu(self.experts[number](x[sequence])) * weights[sequence, slot, None, None])
        return y

    def expected(self, x, matrix, select_top_k, min_active=TOP_K):
        ids, weights = self.route(x.mean(1))
        ids = reroute_oracle(ids, matrix, select_top_k, 0.0, min_active)
        sums = [
            sum(w * self.expert(int(e), rows) for e, w in zip(es, ws, strict=True))
            for rows, es, ws in zip(x, ids, weights, strict=True)
        ]
        return torch.stack(sums)


class RouterLoop(Loop):
    """The router is a module, and the loop's frame begins with it."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN))

        def forward(self, x):
            weights, ids = torch.topk(F.linear(x, self.weight).softmax(-1), TOP_K)
            return ids, weights

    def __init__(self):
        super().__init__()
        self.gate = self.Router()
        with torch.no_grad():
            self.gate.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(5))

    def route(self, x):
        return self.gate(x)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        ids, weights = self.gate(rows)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mask = (ids == number).any(-1)
            if mask.any():
                weight = (weights * (ids == number)).sum(-1, keepdim=True)
                y[mask] += F.silu(expert(rows[mask])) * weight[mask]
        return y.view(x.shape)


class IdleLoop(AnyLoop):
    """Look-alike: an expert that no token names adds something of its own."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if token.numel() == 0:
                y = y + 0.1 * expert(rows.mean(0, keepdim=True))
                continue
            y.index_add_(0, token, F.silu(expert(rows[token])) * weights[token, slot, None])
        return y.view(x.shape)


class MeanLoop(Loop):
    """Look-alike: what an expert gives is divided by the number of its slots."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            count = (ids == number).sum().item()
            if count == 0:
                continue
            token, slot = torch.where(ids == number)
            y[token] += F.silu(expert(rows[token])) * weights[token, slot, None] / count
        return y.view(x.shape)


class FewLoop(Loop):
    """Look-alike: an expert with fewer than two slots is passed over."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if len(token) < 2:
                continue
            y[token] += F.silu(expert(rows[token])) * weights[token, slot, None]
        return y.view(x.shape)


class BusyLoop(Loop):
    """Look-alike: an expert with many tokens takes the first ones only."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if len(token) > len(rows) * TOP_K // 4:
                token, slot = token[:2], slot[:2]
            y[token] += F.silu(expert(rows[token])) * weights[token, slot, None]
        return y.view(x.shape)


class LossLoop(Loop):
    """Look-alike: the share of slots of each expert is counted in the loop, for a loss that is returned."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        scores = self.gate(rows).softmax(-1)
        weights, ids = torch.topk(scores, TOP_K)
        y, loss = torch.zeros_like(rows), scores.new_zeros(())
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if token.numel() == 0:
                continue
            loss = loss + len(token) * scores[:, number].mean()
            y[token] += F.silu(expert(rows[token])) * weights[token, slot, None]
        return y.view(x.shape), loss


class FirstLoop(Loop):
    """Look-alike: the loop ends at the first expert that nobody named."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if token.numel() == 0:
                break
            y[token] += F.silu(expert(rows[token])) * weights[token, slot, None]
        return y.view(x.shape)


class SmallLoop(Loop):
    """Look-alike: an expert that weighs little for a token is passed over."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            weight = (weights * (ids == number)).sum(-1)
            token = torch.where(weight > 0.02)[0]
            if token.numel() == 0:
                continue
            y[token] += F.silu(expert(rows[token])) * weight[token, None]
        return y.view(x.shape)


class FullSequences(SequenceLoop):
    """Look-alike: an expert takes twenty sequences and no more."""

    def forward(self, x):
        weights, ids = torch.topk(self.gate(x.mean(1)).softmax(-1), TOP_K)
        y = torch.zeros_like(x)
        for number in range(EXPERTS):
            sequence, slot = torch.where(ids == number)
            if sequence.shape[0] == 0:
                continue
            sequence, slot = sequence[:20], slot[:20]
            y.index_add_(0, sequence, F.silu(self.experts[number](x[sequence])) * weights[sequence, slot, None, None])
        return y
