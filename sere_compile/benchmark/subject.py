"""The model under test: a user's, or a geometry with random weights; its routers, and matrices to re-route with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SereError
from ..similarity.attach import attach
from ..similarity.profile import SimilarityProfile
from .geometries import GEOMETRIES


@dataclass(frozen=True)
class Block:
    """One Mixture-of-Experts block of a model.

    Attributes:
        name: of the block in the model.
        module: takes hidden states [B, L, H].
        router_weight: name of the router's weight in the block.
        experts: E.
        top_k: K.
        expert_bytes: of the weights of one expert.
    """

    name: str
    module: nn.Module
    router_weight: str
    experts: int
    top_k: int
    expert_bytes: int


@dataclass(frozen=True)
class Subject:
    """A model on the device with matrices attached.

    Attributes:
        name: of the geometry or checkpoint, with the number of layers.
        model: a causal language model in eval mode.
        blocks: its Mixture-of-Experts blocks.
        matrices: similarity by the name of each router's weight in the model.
        routing: where routing and matrices come from, in words.
    """

    name: str
    model: Any
    blocks: tuple[Block, ...]
    matrices: dict[str, torch.Tensor]
    routing: str


def random_model(
    geometry: str, num_layers: int, dtype: torch.dtype | None = None, device: str | None = None
) -> Subject:
    """A named geometry with random weights made on the device: bfloat16 on a GPU, float32 on a CPU."""
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    config = GEOMETRIES[geometry].config(num_layers)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="grouped_mm")
    routing = "random routers (near uniform), random similarity"
    name = f"{geometry}, {num_layers} layers, random weights, {str(dtype).removeprefix('torch.')}"
    return make_subject(name, model.eval(), None, routing)


def loaded_model(name_or_path: str, profile: SimilarityProfile | None, device: str | None = None) -> Subject:
    """A user's checkpoint; random matrices if there is no profile: they cost the same as real ones."""
    from ..integrations.transformers import load_causal_lm

    model, _ = load_causal_lm(name_or_path, device=device)
    routing = "the model's routers on random tokens, " + ("random" if profile is None else "the given") + " similarity"
    return make_subject(name_or_path, model, profile, routing)


def make_subject(name: str, model: Any, profile: SimilarityProfile | None, routing: str) -> Subject:
    """Find the blocks and attach matrices.

    Raises:
        SereError: no block with stacked experts is found.
    """
    blocks = tuple(find_blocks(model))
    if not blocks:
        raise SereError(
            f"{type(model).__name__} has no block with a router [E, H] beside a module `experts` of stacked weights"
        )
    profile = profile or random_profile(blocks)
    attach(model, profile)
    device = next(model.parameters()).device
    return Subject(name, model, blocks, {gate: profile[gate].to(device) for gate in profile}, routing)


def find_blocks(model: nn.Module) -> Iterator[Block]:
    """Modules with a child `experts` of stacked weights and a router [E, H] in another child."""
    default_k = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        stacked = [p for p in experts.parameters() if p.dim() == 3] if isinstance(experts, nn.Module) else []
        if not stacked:
            continue
        count = stacked[0].shape[0]
        routers = [
            (key, owner)
            for child, owner in module.named_modules()
            for key in [f"{child}.weight"]
            if not child.startswith("experts")
            and getattr(owner, "weight", None) is not None
            and owner.weight.dim() == 2
            and owner.weight.shape[0] == count
        ]
        if len(routers) == 1:
            key, router = routers[0]
            top_k: Any = getattr(router, "top_k", None) or default_k
            size = sum(p.numel() * p.element_size() for p in stacked) // count
            yield Block(name, module, key, count, int(top_k), size)


def random_profile(blocks: tuple[Block, ...], seed: int = 0) -> SimilarityProfile:
    """Symmetric matrices of uniform numbers: what re-routing costs does not depend on their values."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for block in blocks:
        matrix = torch.rand(block.experts, block.experts, generator=generator)
        matrices[f"{block.name}.{block.router_weight}"] = ((matrix + matrix.T) / 2).fill_diagonal_(1.0)
    return SimilarityProfile(matrices, {"method": "random"})


def dense_bytes(model: Any, blocks: Sequence[Block]) -> int:
    """Weights that every step reads: all but experts and the embedding table (a step reads one row of it per token)."""
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    experts = sum(block.experts * block.expert_bytes for block in blocks)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(sizes.values()) - experts - (0 if embedding is head else sizes[id(embedding)])
