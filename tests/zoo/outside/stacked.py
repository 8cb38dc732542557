"""MoE layers with stacked experts, and with capacity, after the structure of public code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .loops import EXPERTS, HIDDEN, TOP_K, Loop


class Stacked(Loop):
    """Experts as one tensor [E, H, H] and a gate as before."""

    def __init__(self):
        super().__init__()
        del self.experts
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator) / 4)

    def expert(self, number, x):
        return F.silu(x @ self.weight[number])


class GptFast(Stacked):
    """gpt-fast's Mixtral: softmax over all experts, normalised top-k, weights gathered per slot, einsum."""

    def route(self, x):
        weights, ids = torch.topk(F.softmax(self.gate(x), dim=-1), TOP_K, dim=-1)
        return ids, weights / weights.sum(dim=-1, keepdim=True)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        ids, weights = self.route(rows)
        y = F.silu(torch.einsum("ti,taio->tao", rows, self.weight[ids]))
        return torch.einsum("tao,ta->to", y, weights).view(x.shape)


class Noisy(GptFast):
    """Noisy top-k gating (arXiv 1701.06538): random numbers whose size a second weight gives, also in eval mode."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.noise = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator) / 4)

    def route(self, x):
        logits = self.gate(x)
        noisy = logits + torch.randn_like(logits) * F.softplus(F.linear(x, self.noise))
        weights, ids = torch.topk(noisy, TOP_K)
        return ids, weights.softmax(-1)


class TorchTitan(Stacked):
    """torchtitan: sigmoid, selection by a bias that balances load, slots sorted by expert, one product a group."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Buffer(torch.linspace(-0.2, 0.2, EXPERTS))

    def route(self, x):
        scores = torch.sigmoid(self.gate(x).to(torch.float32))
        # Sorted here, because what is expected ranks by score; torchtitan asks for no order.
        ids = torch.topk(scores + self.bias, TOP_K, dim=1)[1]
        return ids, scores.gather(dim=1, index=ids)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        scores = torch.sigmoid(self.gate(rows).to(torch.float32))
        ids = torch.topk(scores + self.bias, k=TOP_K, dim=1, sorted=False)[1]
        weights = scores.gather(dim=1, index=ids)
        counts = torch.histc(ids.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS)
        order = torch.argsort(ids.view(-1), stable=True)
        index = (order // TOP_K).reshape(-1, 1).expand(-1, HIDDEN)
        routed = torch.gather(rows, dim=0, index=index)
        parts = torch.split(routed, counts.int().tolist())
        y = torch.cat([F.silu(part @ self.weight[number]) for number, part in enumerate(parts)])
        y = y * weights.view(-1)[order].reshape(-1, 1)
        return torch.zeros_like(rows).scatter_add(dim=0, index=index, src=y).view(x.shape)


class MegaBlocks(Stacked):
    """megablocks: sorted slots, bounds from a histogram, rows scattered back and summed over the ranks."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(dim=-1), TOP_K, dim=-1)
        flat, order = torch.sort(ids.flatten())
        ends = torch.bincount(flat, minlength=EXPERTS).cumsum(0)
        owner = torch.searchsorted(ends, torch.arange(flat.shape[0]), right=True)
        y = F.silu((rows[order // TOP_K].unsqueeze(1) @ self.weight[owner]).squeeze(1))
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*ids.shape, HIDDEN) * weights.unsqueeze(-1)).sum(1).view(x.shape)


class MakeMoe(Stacked):
    """makeMoE: top-k logits scattered among -inf, softmax over all, each expert masks its rows."""

    def route(self, x):
        logits, ids = self.gate(x).topk(TOP_K, dim=-1)
        return ids, logits.softmax(-1)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        logits = self.gate(rows)
        top, ids = logits.topk(TOP_K, dim=-1)
        weights = torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(-1)
        y = torch.zeros_like(rows)
        for number in range(EXPERTS):
            mine = (ids == number).any(dim=-1)
            y = y + torch.where(mine[:, None], self.expert(number, rows) * weights[:, number, None], 0.0)
        return y.view(x.shape)


class StMoe(Stacked):
    """st-moe-pytorch: top-2 with a place for each token in its expert's buffer; what finds none is dropped."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        gates = self.gate(rows).softmax(dim=-1)
        weights, ids = gates.topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        mask = F.one_hot(ids, EXPERTS).to(x.dtype)  # [T, 2, E]
        place = (mask.transpose(0, 1).flatten(0, 1).cumsum(0) - 1).view(2, -1, EXPERTS).transpose(0, 1)
        mask = mask * (place < 3)
        slot = F.one_hot((place * mask).sum(-1).long(), 3).to(x.dtype)  # [T, 2, 3]
        combine = torch.einsum("tk,tke,tkc->tec", weights, mask, slot)
        inputs = torch.einsum("tec,th->ech", (combine > 0).to(x.dtype), rows)
        return torch.einsum("tec,ech->th", combine, F.silu(torch.bmm(inputs, self.weight))).view(x.shape)


class FairScale(Stacked):
    """fairscale's top-2 gate: two arg-maxima, the second with the first masked, and a capacity."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        logits = self.gate(rows)
        gates = F.softmax(logits, dim=1)
        first = F.one_hot(torch.argmax(gates, dim=1), EXPERTS)
        without = logits.masked_fill(first.bool(), float("-inf"))
        second = F.one_hot(torch.argmax(without, dim=1), EXPERTS)
        place1 = torch.cumsum(first, dim=0) - 1
        place2 = torch.cumsum(second, dim=0) - 1 + torch.sum(first, dim=0, keepdim=True)
        first, second = first * (place1 < 4), second * (place2 < 4)
        parts = []
        for mask, place in ((first, place1), (second, place2)):
            slot = F.one_hot((place * mask).sum(1), 4).to(x.dtype)
            parts.append(((gates * mask).sum(1)[:, None] * mask).unsqueeze(2) * slot.unsqueeze(1))
        combine = parts[0] + parts[1]
        inputs = torch.einsum("tec,th->ech", combine.bool().to(x.dtype), rows)
        return torch.einsum("tec,ech->th", combine, F.silu(torch.bmm(inputs, self.weight))).view(x.shape)


class Picked(Stacked):
    """Hunyuan-Large: a mask of the ids gives tokens places in buffers, and picks weights out of a table of scores."""

    rows_per_expert = TOP_K  # for each token: as many as its slots

    def route(self, x):
        weights, ids = torch.topk(self.gate(x).softmax(-1), TOP_K)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        scores = self.gate(rows).softmax(-1)
        _, ids = torch.topk(scores, TOP_K)
        chosen = F.one_hot(ids, EXPERTS)
        table = scores / torch.matmul(chosen.float(), scores.unsqueeze(-1)).sum(1).clamp(min=1e-6)
        order = F.one_hot(ids.transpose(0, 1).reshape(-1), EXPERTS)
        place = (torch.cumsum(order, 0) * order - 1).reshape(TOP_K, -1, EXPERTS).transpose(0, 1).max(1)[0]
        room = self.rows_per_expert * len(rows)
        buffer = F.one_hot(place.masked_fill(place < 0, 0), room) * (place >= 0).unsqueeze(-1)
        inside = torch.einsum("tec,th->ech", buffer.float(), rows)
        made = F.silu(torch.bmm(inside, self.weight))
        weights = torch.einsum("te,tec->tec", table, buffer.float())
        return torch.einsum("tec,ech->th", weights, made).view(x.shape)


class PickedTight(Picked):
    """With room for fewer slots: if all move to one expert, they do not fit."""

    rows_per_expert = TOP_K - 1
