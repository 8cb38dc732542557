"""Which similarity matrix belongs to which MoE layer of an engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ProbeError, ProfileError
from ...experts.probe import PROBE_TOKENS, Probed, module_dispatch, probe_experts
from ...similarity.profile import SimilarityProfile
from ...similarity.profile_file import is_torch_file, open_safetensors, some
from .ranks import experts_on_own_rows, sum_of_shares

log = logging.getLogger(__name__)


def find_profile(path: str | None, model: str) -> SimilarityProfile | None:
    """The profile at `path`, or the matrices that the reference implementation left in the model's folder.

    Raises:
        ProfileError: no such file, or one that holds no usable matrices.
    """
    if path is not None:
        file = Path(path)
        return SimilarityProfile.from_reference(file) if file.is_dir() or is_torch_file(file) else _load(file)
    folder = Path(model)
    if not folder.is_dir() or not _is_calibrated(folder):
        return None
    log.info("SERE: the checkpoint %s brings its own similarity matrices", folder)
    return SimilarityProfile.from_reference(folder)


def _load(file: Path) -> SimilarityProfile:
    with open_safetensors(file) as opened:
        calibrated = any(name.endswith(".similarity_matrix") for name in opened.keys())  # noqa: SIM118
    return SimilarityProfile.from_reference(file) if calibrated else SimilarityProfile.load(file)


def _is_calibrated(folder: Path) -> bool:
    if (folder / "similarity_matrices.pt").exists():
        return True
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return ".similarity_matrix" in index.read_text(encoding="utf-8")
    if not single.exists():
        return False
    with open_safetensors(single) as opened:
        return any(name.endswith(".similarity_matrix") for name in opened.keys())  # noqa: SIM118


def match_layers(profile: SimilarityProfile, experts: Mapping[str, int], complete: bool) -> dict[str, str]:
    """The gate in the profile of each MoE layer, by the layer's name in vLLM.

    vLLM names a layer by its experts (`model.layers.3.block_sparse_moe.experts`), a profile by its
    router's weight in transformers (`model.layers.3.mlp.gate.weight`): the numbers in both names
    identify the layer.

    Args:
        profile: to take matrices from.
        experts: for each MoE layer how many experts it has.
        complete: whether `experts` are all layers of the model (no pipeline stages).

    Raises:
        ProfileError: a layer without a matrix, with several, or with one of another size; a matrix
            without a layer.
    """
    by_numbers: dict[tuple[int, ...], list[str]] = {}
    for gate in profile:
        by_numbers.setdefault(_numbers(gate), []).append(gate)
    matched: dict[str, str] = {}
    for layer, num_experts in experts.items():
        gates = by_numbers.get(_numbers(layer), [])
        if len(gates) != 1:
            raise ProfileError(
                f"the similarity profile has {len(gates) or 'no'} matrices for vLLM's MoE layer {layer}; "
                f"it holds {some(gates or profile)}"
            )
        shape = tuple(profile[gates[0]].shape)
        if shape[0] != num_experts:
            raise ProfileError(
                f"{gates[0]}: the similarity matrix of shape {shape} does not fit {layer}, "
                f"which has {num_experts} experts"
            )
        matched[layer] = gates[0]
    used = set(matched.values())
    if complete and (extra := [gate for gate in profile if gate not in used]):
        raise ProfileError(
            f"the similarity profile has matrices for gates that this model does not have: {some(extra)}"
        )
    return matched


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def probe_layer(runner: Any, vllm_config: Any, device: torch.device) -> Probed:
    """How alike a layer's experts are, without data, through the layer's own kernel.

    Each expert runs on the same random hidden states as the only one with weight. That needs no
    knowledge of how the weights are packed or quantised, and the outputs that ranks sum are the same
    on every rank. All ranks of the engine have to probe their layers at the same time, in this order.

    Raises:
        ProbeError: the layer's kernel gives no plain tensor, or not finite ones, or it is bound to an exchange
            of tokens between ranks.
    """
    from vllm.distributed import tensor_model_parallel_all_reduce

    moe = runner.moe_config
    rows = max(1, min(8 * PROBE_TOKENS, int(vllm_config.scheduler_config.max_num_batched_tokens)))

    def experts(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output = own_experts(hidden, ids, weights)
        if shares:
            return sum_of_shares(output)
        return output if runner._fused_output_is_reduced else tensor_model_parallel_all_reduce(output)

    try:
        with experts_on_own_rows(runner, vllm_config, device, rows) as (own_experts, shares):
            dispatch = module_dispatch(experts, moe.hidden_dim, moe.in_dtype, device)
            return probe_experts(dispatch, rows, moe.num_logical_experts, moe.experts_per_token, device)
    except ProbeError as error:
        raise ProbeError(f"{runner.layer_name}: its experts cannot be probed: {error}. Give a profile") from error


def agree(matrix: Tensor) -> Tensor:
    """The matrix of the first of the ranks whose tokens meet, on all of them."""
    from vllm.distributed import get_dp_group, get_ep_group, get_tp_group

    group = get_ep_group() if get_dp_group().world_size > 1 else get_tp_group()
    return group.broadcast(matrix.contiguous(), src=0) if group.world_size > 1 else matrix
