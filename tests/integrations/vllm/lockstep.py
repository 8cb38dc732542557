"""What transformers says: greedy decoding of a batch in step, alone or with our backend."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import sere_compile
from sere_compile import SimilarityProfile

from .engine import TOKENS


def in_transformers(
    folder: Path, prompts: list[list[int]], profile: str | None = None, tokens: int = TOKENS, **options
) -> list[list[int]]:
    """Continuations of prompts of equal length, re-routed where there is a profile.

    The forward of the prompts is above max_tokens and left alone, as it is in the engine.
    """
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    step = network
    if profile is not None:
        sere_compile.attach(network, SimilarityProfile.load(profile))
        torch._dynamo.reset()
        settings = {"max_tokens": len(prompts), "inner": "eager", **options}
        step = torch.compile(network, backend="sere", options=settings)
    ids, cache, columns = torch.tensor(prompts), None, []
    with torch.no_grad():
        for _ in range(tokens):
            output = step(ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            columns.append(ids)
    return torch.cat(columns, 1).tolist()
