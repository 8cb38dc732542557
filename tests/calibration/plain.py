"""Plain computations that keep every expert's outputs on every token."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as F

from sere_compile import calibrate

from ..tiny_models import gate_names

FIRST, SECOND = gate_names()


def run(model, batches, **options):
    return calibrate(model, batches, progress=False, **options)


def expert_outputs(model, batches):
    """[E, T, H] float64 for each gate: hidden states by hooks, experts one after the other from their weights."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(f"model.layers.{i}.mlp").register_forward_hook(
            lambda module, inputs, output, i=i: seen.setdefault(gate_names()[i], []).append(inputs[0].flatten(0, -2))
        )
        for i in range(2)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False) if isinstance(batch, dict) else model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for i, name in enumerate(gate_names()):
        found[name] = outputs_of(model.model.layers[i].mlp.experts, torch.cat(seen[name]))
    return found


def outputs_of(experts, hidden):
    """[E, T, H] float64: experts one after the other."""
    outputs = []
    for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, value = F.linear(hidden, up).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * value, down))
    return torch.stack(outputs).detach().double()


def pairs(outputs, function):
    """The matrix of a function of two experts' outputs."""
    number = len(outputs)
    matrix = torch.empty(number, number, dtype=torch.float64)
    for p, q in itertools.product(range(number), repeat=2):
        matrix[p, q] = function(outputs[p], outputs[q])
    return matrix


def plain_frobenius(outputs):
    distance = pairs(outputs, lambda a, b: (a - b).norm())
    return 1 - distance / distance.max()


def plain_cosine(outputs):
    return pairs(outputs, lambda a, b: F.cosine_similarity(a, b, dim=-1).mean())


def plain_cka(kernel):
    def of_kernel(x):
        if kernel == "linear":
            return x @ x.T
        if kernel == "polynomial":
            return (x @ x.T + 1) ** 3
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        between = distances[~torch.eye(len(x), dtype=torch.bool)]
        return torch.exp(-distances / (2 * 0.8**2 * between.median()))

    def hsic(a, b):
        centring = torch.eye(len(a), dtype=torch.float64) - 1 / len(a)
        return torch.trace(of_kernel(a) @ centring @ of_kernel(b) @ centring)

    return lambda outputs: pairs(outputs, lambda a, b: hsic(a, b) / torch.sqrt(hsic(a, a) * hsic(b, b)))


METRICS = {
    ("frobenius", "linear"): plain_frobenius,
    ("cosine", "linear"): plain_cosine,
    ("cka", "linear"): plain_cka("linear"),
    ("cka", "rbf"): plain_cka("rbf"),
    ("cka", "polynomial"): plain_cka("polynomial"),
}
