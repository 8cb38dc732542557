"""Shapes of published models, against transformers."""

import pytest
import torch

from sere_compile.benchmark.geometries import GEOMETRIES


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_geometries_are_what_transformers_builds(name):
    """The layer shapes that bytes are counted with are those of the model, on no device."""
    from transformers import AutoModelForCausalLM

    from sere_compile.benchmark.subject import find_blocks

    geometry = GEOMETRIES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry.config(2), dtype=torch.bfloat16)
    block = list(find_blocks(model))[-1]
    assert (block.experts, block.top_k) == (geometry.experts, geometry.top_k)
    assert block.expert_bytes == geometry.expert_elements * 2
    (gate_up,) = (p for n, p in block.module.named_parameters() if n.endswith("gate_up_proj"))
    wide, deep = 2 * geometry.inner, geometry.hidden
    assert gate_up.shape == (geometry.experts, *((deep, wide) if geometry.transposed else (wide, deep)))
