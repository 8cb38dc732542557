"""Blocks whose ids leave the graph, for trials of the code that receives them."""

import itertools

import torch
from torch import nn

EXPERTS, HIDDEN, TOP_K = 8, 16, 3


class Experts(nn.Module):
    """A loop over the experts that were hit, which breaks the graph; `weigh` is done to the weights inside."""

    def __init__(self, weigh=lambda weights: weights):
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
        self.weigh = weigh

    def forward(self, x, ids, weights):
        weights = self.weigh(weights)
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out

    def expert(self, x, number):
        return torch.tanh(x @ self.w[number])


class Overwriting(Experts):
    """`out[token] += y` loses one of two slots of a token that name the same expert."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            out[token] += self.expert(x[token], expert) * weights[token, slot, None]
        return out


class InVmap(Experts):
    """All experts at once by `torch.func.vmap`, of which no part can be run by itself, and a table picks."""

    def forward(self, x, ids, weights):
        outputs = torch.func.vmap(lambda w: torch.tanh(x @ w))(self.w)
        return torch.einsum("te,eth->th", x.new_zeros(len(x), EXPERTS).scatter(1, ids, weights), outputs)


class Chained(Experts):
    """Experts by rank, one after the other: re-routed ids are right, merged ones change the order."""

    def forward(self, x, ids, weights):
        for slot in range(ids.shape[1]):
            rows = [self.expert(x[t], int(ids[t, slot])) * weights[t, slot] for t in range(len(x))]
            x = torch.stack(rows) + x
        return x


class Split(Experts):
    """Sorted slots split by counts from a table, which counts an expert that a token names twice once."""

    def forward(self, x, ids, weights):
        counts = ids.new_zeros(len(ids), EXPERTS).scatter_(1, ids, 1).sum(0)
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        parts = rows.split(counts.tolist())
        made = torch.cat([self.expert(part, number) for number, part in enumerate(parts)])
        slots = torch.empty_like(made)
        slots[order] = made
        return (slots.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


class Unweighted(Experts):
    """Divides by the number of distinct experts, whatever the weights are: no rewrite is right."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for t in range(len(x)):
            distinct = ids[t].unique().tolist()
            out[t] = sum(self.expert(x[t], e) for e in distinct) / len(distinct)
        return out


class Values(Experts):
    """A table of values that the indices fetch: no expert acts on a hidden state."""

    def forward(self, x, ids, weights):
        ids.sum().item()
        return (self.w[ids, 0] * weights[..., None]).sum(-2)


class Scaled(Experts):
    """A number per expert scales the weights: it goes with what the router chose, and new ids would fetch another."""

    def __init__(self, sizes=(EXPERTS,)):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(sizes) + 0.5)

    def forward(self, x, ids, weights):
        ids.sum().item()
        return super().forward(x, ids, weights * self.scale[ids].view(weights.shape))


class OneOutput(Experts):
    """Experts of one number each, the bias of which is a number per expert, too, and their own."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS))

    def expert(self, x, number):
        return (torch.tanh(x @ self.w[number]).sum(-1, keepdim=True) + self.bias[number]).expand(x.shape)


class BiasBeside(Experts):
    """A vector per expert, and a matrix that all share."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.shared = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def expert(self, x, number):
        return torch.tanh(x @ self.w[number]) + self.bias[number] + (x @ self.shared.T).sum(-1, keepdim=True)


class Prompts(Experts):
    """Prompts that the indices fetch and the hidden states attend to; the weights weigh nothing of them."""

    def forward(self, x, ids, weights):
        ids.sum().item()
        prompts = self.w[ids].flatten(1, 2)
        return ((prompts @ x[:, :, None]).softmax(1) * prompts).sum(1)


class ScalingValues(Experts):
    """Values of a table that scale the hidden states: what comes out depends on them, and no expert acts on them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, ids, weights):
        ids.sum().item()
        return self.out((self.w[ids] * weights[..., None]).sum(1)) * x


class Listed(Experts):
    """A list of modules."""

    def __init__(self):
        super().__init__()
        del self.w
        self.mlps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def expert(self, x, number):
        return self.mlps[number](x)


class TwoLayers(Listed):
    """Two matrices and two vectors for each."""

    def expert(self, x, number):
        return torch.tanh(self.mlps[number](x)) * 2


class ScaledModule(nn.Module):
    """An expert with a number of its own, as a scale that it is dequantised by, and a norm."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN)
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x):
        return self.norm(self.linear(x)) * self.scale


class ScaledModules(Listed):
    """A list of them, in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(ScaledModule() for _ in range(EXPERTS)).eval()


class Padding(Experts):
    """Half of the tokens, or what a mask marks, are sent to the expert `target`; -1 is none."""

    def __init__(self, target, weigh=lambda weights: weights):
        super().__init__(weigh)
        self.target = target

    def forward(self, x, ids, weights, mask=None):
        mask = torch.arange(len(x)) < len(x) // 2 if mask is None else mask
        ids = torch.where(mask.view(-1, 1), ids, self.target)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out


class Block(nn.Module):
    def __init__(self, experts, returns=lambda output, weights: output):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts
        self.returns = returns

    def forward(self, x):
        out, weights = self.routed(x)
        return self.returns(out.view(x.shape), weights)

    def routed(self, x):
        scores = self.gate(x.view(-1, HIDDEN)).softmax(-1)
        weights, ids = scores.topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.experts(x.view(-1, HIDDEN), ids, weights), weights


class Counting(Block):
    """A buffer counts the tokens of each expert, as the router chose them."""

    def __init__(self, experts, count):
        super().__init__(experts)
        self.count = count
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64))

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        self.count(self.load, ids)
        return self.experts(x.view(-1, HIDDEN), ids, weights).view(x.shape)


SEEN = []


class Owner(nn.Module):
    """Keeps what its layers chose."""

    def __init__(self):
        super().__init__()
        self.log = []
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


class Keeping(Block):
    """The ids are kept beside what is returned, in one of several places, for whoever asks later."""

    def __init__(self, place):
        super().__init__(Experts())
        self.place, self.log = place, []
        self.owner, self.numbers = [Owner()], itertools.count()

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        out = self.experts(x.view(-1, HIDDEN), ids, weights).view(x.shape)
        if self.place == "a module that is no part of it":
            self.owner[0].log.append(ids)
        if self.place == "a buffer of a module that is no part of it":
            self.owner[0].count += ids.sum()
        if self.place == "an attribute":
            self.last = ids
        if self.place == "a list":
            self.log.append(ids)
        if self.place == "a global":
            SEEN.append(ids)
        if self.place == "by numbers that go on":
            self.log.extend(next(self.numbers) for _ in range(int(ids[:, -1].sum())))
        if self.place == "numbers":
            return out, ids.tolist()
        return (out, ids.numpy()) if self.place == "an array" else out


class MaskedLater(nn.Module):
    """The code behind the end of the graph makes a mask of what it is given, and sends what that marks to an expert."""

    def __init__(self, told, sent=lambda ids: 2):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.told, self.sent = told, sent

    def forward(self, x, given=None):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        torch._dynamo.graph_break()
        ids = ids if given is None else torch.where(self.told(given), ids, self.sent(ids))
        return self.experts(x, ids, weights)


class Plain(nn.Module):
    """A router whose choice is made by `select`, and experts that take `(hidden, ids, weights, *more)`."""

    def __init__(self, experts, select=lambda logits: logits.softmax(-1).topk(TOP_K)):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts
        self.select = select

    def forward(self, x, *more):
        weights, ids = self.select(self.gate(x.view(-1, HIDDEN)))
        return self.experts(x.view(-1, HIDDEN), ids, weights, *more)


def rows():
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
