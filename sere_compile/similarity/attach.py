"""Attach a profile to a model: every router's weight gets its matrix.

A matrix belongs to the *weight of a router*, not to a graph: a compiled graph is reused for every
layer with the same code, so the backend finds the matrix of a call by the identity of the router
weight that it is given.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping

import torch

from ..errors import ProfileError, expect
from ..experts.experts_module import experts_stand_beside
from ..experts.owner import Owner, Owners
from . import binding
from .profile import SimilarityProfile
from .profile_file import some
from .reference_import import parameters_by_plain_name, plain_name

# Where a model keeps the profile attached to it.
_PROFILE_ATTRIBUTE = "_sere_profile"


def attach(model: torch.nn.Module, profile: SimilarityProfile | str | os.PathLike[str]) -> None:
    """Give every router of `model` its matrix of `profile`, for `torch.compile(model, backend="sere")`.

    All or nothing: the profile is checked against the whole model before anything is recorded. The
    model may be on any device (meta included) and compiled already. It keeps the profile as an
    attribute, so that copies of the model and weights that are loaded into it later have it too.
    Attaching again replaces.

    Args:
        model: the model.
        profile: a profile, or the path of a file that `SimilarityProfile.save` wrote.

    Raises:
        ArgumentError: `model` is none.
        ProfileError: `profile` is neither, or its file cannot be read; a gate the model does not have; a
            router weight that is not 2-D with a dimension of E; a router like the profile's that
            has no matrix; two gates that are one parameter.
    """
    expect(model, torch.nn.Module, "attach takes a torch.nn.Module")
    if isinstance(profile, (str, os.PathLike)):
        profile = SimilarityProfile.load(profile)
    if not isinstance(profile, SimilarityProfile):
        raise ProfileError(
            f"attach needs a SimilarityProfile, got {type(profile).__name__}; "
            "wrap a dict as SimilarityProfile({name: matrix})"
        )
    parameters = parameters_by_plain_name(model)
    gates = {gate: plain_name(gate) for gate in profile}
    _check_known(gates.values(), parameters, {plain_name(name) for name, _ in model.named_buffers()})
    _check_distinct(gates.values(), parameters)
    owners = Owners()
    for gate, name in gates.items():
        _check_router_shape(name, parameters[name], profile[gate], owners)
    _check_complete(gates.values(), parameters)
    setattr(_plain_module(model), _PROFILE_ATTRIBUTE, profile)
    for gate, name in gates.items():
        binding.assign(parameters[name], name, profile[gate], profile.source, projection=profile.projection(gate))


def attach_from_owner(owner: Owner) -> None:
    """Bind a router weight by its name, where a module that owns it has a profile: a copy, or weights loaded later.

    Args:
        owner: of the weight.

    Raises:
        ProfileError: a profile is attached, and it has no matrix for this gate.
    """
    names = owner.name.split(".")
    for depth, module in enumerate(owner.chain, start=1):
        profile = module.__dict__.get(_PROFILE_ATTRIBUTE)
        if profile is None:
            continue
        name = ".".join(names[-depth:])
        gate = next((gate for gate in profile if plain_name(gate) == name), None)
        if gate is None:
            raise ProfileError(
                f"a similarity profile is attached to this model, but it has no matrix for the gate {name}. "
                f"Calibrate the whole model again, or call sere_compile.detach(model) to probe every gate"
            )
        projection = profile.projection(gate)
        binding.assign(owner.weight, owner.name, profile[gate], profile.source, projection=projection)
        return


def _plain_module(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "_orig_mod", model)


def detach(model: torch.nn.Module) -> None:
    """Forget the matrices, attached or probed, and the counters of `model`'s routers, if there are any.

    Raises:
        ArgumentError: `model` is none.
    """
    expect(model, torch.nn.Module, "detach takes a torch.nn.Module")
    _plain_module(model).__dict__.pop(_PROFILE_ATTRIBUTE, None)
    for parameter in model.parameters():
        # `forget` makes compiled graphs ask for their matrices again; spare them that for nothing.
        if binding.lookup(parameter) is not None:
            binding.forget(parameter)


def _check_known(gates: Iterable[str], parameters: Mapping[str, torch.nn.Parameter], buffers: set[str]) -> None:
    unknown = [gate for gate in gates if gate not in parameters]
    if not unknown:
        return
    if unknown[0] in buffers:
        raise ProfileError(
            f"the profile's gate {unknown[0]} is a buffer of the model, and a matrix belongs to a parameter: register "
            f"it as torch.nn.Parameter(..., requires_grad=False), or compile without a profile"
        )
    routers = [name for name, parameter in parameters.items() if parameter.ndim == 2]
    near = difflib.get_close_matches(unknown[0], routers, n=3, cutoff=0.0)
    raise ProfileError(
        f"the profile's gate {unknown[0]} is not a parameter of the model ({len(unknown)} unknown: "
        f"{some(unknown)}); the nearest names in the model are {some(near)}"
    )


def _check_distinct(gates: Iterable[str], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    seen: dict[int, str] = {}
    for gate in gates:
        other = seen.setdefault(id(parameters[gate]), gate)
        if other != gate:
            raise ProfileError(f"{other} and {gate} are one parameter; it can have one matrix only")


def _check_router_shape(name: str, weight: torch.nn.Parameter, matrix: torch.Tensor, owners: Owners) -> None:
    if weight.ndim == 2 and (len(matrix) in weight.shape or _has_further_columns(weight, len(matrix), owners)):
        return
    raise ProfileError(
        f"{name}: the similarity matrix of shape {tuple(matrix.shape)} does not fit the router weight of "
        f"shape {tuple(weight.shape)}, which must be 2-D with one row (or column) for each of {len(matrix)} "
        "experts; the profile was made for another model, or the router scores more than real experts"
    )


def _has_further_columns(weight: torch.nn.Parameter, num_experts: int, owners: Owners) -> bool:
    """Whether a router scores more than its experts: a shared expert, or a choice of none."""
    return weight.shape[0] > num_experts and experts_stand_beside(owners.find(weight), num_experts)


def _check_complete(gates: Iterable[str], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Every parameter that is a profile's gate but for the layer index must have a matrix of its own."""
    gates = list(gates)
    kinds = {(_any_layer(gate), parameters[gate].shape) for gate in gates}
    covered = {id(parameters[gate]) for gate in gates}
    missing = [
        name
        for name, parameter in parameters.items()
        if id(parameter) not in covered and (_any_layer(name), parameter.shape) in kinds
    ]
    if missing:
        raise ProfileError(
            f"the model's router {missing[0]} has no matrix in the profile ({len(missing)} without: "
            f"{some(missing)}); the profile's gates are {some(gates)}. Calibrate this model anew"
        )


def _any_layer(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
