"""What tests of compiled models share: logits, the oracle's, an inner compiler that counts, models without gates."""

import torch
from torch import nn

from sere_compile.testing import oracle_routing


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def oracle_logits(model, profile, ids, select_top_k, **options):
    with oracle_routing(model, profile, select_top_k, **options):
        return logits(model, ids)


class CountingInner:
    """An inner backend that counts the graphs it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 50)

    def forward(self, x):
        return torch.topk(self.head(x).softmax(-1), 3)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        torch._dynamo.graph_break()
        return self.layer(x)


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Dense()

    def forward(self, x):
        for _ in range(1):
            found = self.inner(x)
            torch._dynamo.graph_break()
        return found
