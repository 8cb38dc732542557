"""`rewrite`: SERE in a graph that was traced ahead of time (torch.export, make_fx, symbolic_trace)."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from .compiler import gate_options
from .compiler.gate_plan import routing_settings
from .compiler.missing_gates import describe_nearest_miss
from .config import SereConfig
from .errors import ConfigError, GateNotFoundError, ProbeError, ProfileError
from .experts.hidden_states import scale_at
from .experts.module_tree import find_experts, find_owner
from .experts.probe import MODULE_ROWS, Dispatch, Probed, module_dispatch, probe_experts, region_dispatch
from .passes import (
    Gate,
    NormScale,
    Proof,
    Rewrite,
    Skip,
    extract_dispatch,
    find_gates,
    reroute_dispatch,
    verify_rewrite,
)
from .passes.graph import nodes
from .similarity.profile import SimilarityProfile
from .similarity.threshold import ranked, resolve_threshold

log = logging.getLogger(__name__)

Traced = TypeVar("Traced", GraphModule, ExportedProgram)


# The options that say what re-routing is in a program, and those that only say how a graph is captured and compiled.
_USED = frozenset(
    {"select_top_k", "threshold", "min_active", "max_active", "max_tokens", "substitution", "per_gate", "strict"}
)
_OF_THE_COMPILER = frozenset({"inner", "capture", "fuse_router", "lower_experts"})

# make_fx forgets where a parameter comes from; the live model still knows.
_NAMED_BY_MAKE_FX = re.compile(r"_(param|tensor)_constant\d+")
_NO_SHAPES = (
    "Its nodes carry no shapes, as symbolic_trace leaves them: "
    "torch.fx.passes.shape_prop.ShapeProp(graph_module).propagate(*example_inputs) records them"
)


def rewrite(traced: Traced, *, profile: SimilarityProfile | None = None, config: SereConfig | None = None) -> Traced:
    """Re-route every gate of a traced graph. Similarity matrices become buffers of the result.

    Args:
        traced: an `ExportedProgram`, or a `GraphModule` whose nodes carry shapes. It is not changed.
        profile: a matrix for every gate, by the name of its router weight (in the live model, or as make_fx names it).
            Without one the experts are probed: in the graph where its batch size is fixed, else in the model it was
            traced from, which has to be there still.
        config: S, threshold, min_active, max_active, max_tokens, substitution, per_gate and strict; the backend's
            defaults otherwise. `inner` has no meaning here.

    Returns:
        A rewritten copy that shares the weights.

    Raises:
        GateNotFoundError: no gate was found or every gate was refused; the message says why.
        ConfigError: max_tokens is given, and the program takes batches on both sides of it; or collect_stats is.
        ProfileError: the profile has no matrix for a gate, or one of another size, or lacks projections that are
            asked for.
        ProbeError: without a profile, an expert could not be run.
    """
    program = _Program(traced)
    config = config or SereConfig()
    _check_options(config)
    findings = find_gates(program.module)
    if not findings.gates:
        why = describe_nearest_miss(findings.nearest_miss) if program.has_shapes() else _NO_SHAPES
        raise GateNotFoundError(f"no MoE gate in the traced graph. {why}")
    if config.per_gate:
        gate_options.tell_unknown(config, [program.weight_name(gate) for gate in findings.gates], "the program")
    plans = [(gate, config.for_gate(program.weight_name(gate))) for gate in findings.gates]
    matrices = [
        None if _too_many_tokens(gate, own.max_tokens) else _matrices(gate, own, profile, program)
        for gate, own in plans
    ]
    refused: list[Skip] = []
    for (gate, own), found in zip(plans, matrices, strict=True):
        if found is None:
            continue
        buffers = [program.add_buffer(matrix, kind) for kind, matrix in found.items()]
        shown = verify_rewrite(gate, program.value_if_held) if own.strict else None
        if isinstance(shown, Skip):
            done: Rewrite | Skip = shown
        else:
            done = reroute_dispatch(gate, buffers[0], routing_settings(gate, own), *buffers[1:])
        if isinstance(shown, Proof):
            log.info("%s: proven: S = K changes no bit; S < K gives %s", program.weight_name(gate), shown.value)
        if isinstance(done, Skip):
            log.warning("%s is not re-routed: %s", program.weight_name(gate), done)
            for node in reversed(buffers):
                program.remove_buffer(node)
            refused.append(done)
    if refused and (config.strict or len(refused) == len(findings.gates)):
        raise GateNotFoundError(f"{len(refused)} of {len(findings.gates)} gates were refused: {refused[0]}")
    return program.finish()


def _check_options(config: SereConfig) -> None:
    """Refuse an option that would be ignored here; those of the compiler behind us have nothing to act on."""
    if config.collect_stats:
        raise ConfigError(
            "collect_stats counts in models that torch.compile compiled; a program traced ahead of time keeps no "
            "counters. Use config.replace(collect_stats=False) here, and count with backend='sere'"
        )
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name not in _USED | _OF_THE_COMPILER and value != option.default:
            raise ConfigError(
                f"{option.name}={value!r} is for backend='sere'; a program traced ahead of time takes "
                f"{', '.join(sorted(_USED))}"
            )


def _too_many_tokens(gate: Gate, max_tokens: int | None) -> bool:
    """Compares the batch with the limit; a program cannot take both sides, unlike a model that compiles again."""
    if max_tokens is None:
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # here, because it imports sympy

    above = math.prod((nodes.shape(gate.ids) or ())[:-1]) > max_tokens
    if statically_known_true(above):
        return True
    if statically_known_true(torch.sym_not(above)):
        return False
    raise ConfigError(
        f"max_tokens={max_tokens} lies inside the range of batch sizes of this program. Export prefill and decoding "
        f"apart, and rewrite the decoding program"
    )


def _matrices(
    gate: Gate, config: SereConfig, profile: SimilarityProfile | None, program: _Program
) -> dict[str, torch.Tensor] | None:
    """What the gate's re-routing reads, on its weight's device, or None where there is nothing to re-route."""
    if config.resolved_top_k(gate.top_k) >= gate.top_k:
        return None
    name, weight = program.weight_name(gate), program.value(gate.router_weight)
    if profile is None:
        probed = _probe(gate, name, weight, program)
        matrix, projection = probed.similarity, probed.projection
    else:
        matrix, projection = _of_profile(gate, name, config, profile)
    if isinstance(config.threshold, str):
        matrix = ranked(matrix, resolve_threshold(config.threshold, matrix))
    found = {"similarity": matrix}
    if config.substitution == "projection":
        found["projection"] = projection.fill_diagonal_(1.0)
    return {kind: value.to(device=weight.device, dtype=torch.float32, copy=True) for kind, value in found.items()}


def _of_profile(
    gate: Gate, name: str, config: SereConfig, profile: SimilarityProfile
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity and, where it is asked for, projection coefficients of a gate."""
    given = str(gate.router_weight.target)  # make_fx has names of its own, which a profile may go by
    if name not in profile and given not in profile:
        raise ProfileError(f"the profile has no matrix for the gate {name}; it has {', '.join(profile)}")
    known = name if name in profile else given
    matrix, projection = profile[known], profile.projection(known)
    if matrix.shape[0] != gate.num_experts:
        raise ProfileError(f"the matrix for {name} is {list(matrix.shape)}, its gate has {gate.num_experts} experts")
    if projection is None and config.substitution == "projection":
        raise ProfileError(
            'substitution="projection" needs projection coefficients, and this profile has none: make one with '
            "sere_compile.calibrate(model, batches), whose profiles have them"
        )
    return matrix, matrix if projection is None else projection


def _probe(gate: Gate, name: str, weight: torch.Tensor, program: _Program) -> Probed:
    """How alike a gate's experts are: run in the graph, else in the live model that owns the router weight."""
    log.info("no profile is given: probing the experts of %s on random hidden states", name)
    found = _dispatch_of_graph(gate, program)
    if isinstance(found, str):
        experts = find_experts(weight, gate.num_experts)
        if experts is None:
            raise ProbeError(
                f"no profile is given, and the experts of {name} cannot be probed: {found}, and no experts module "
                "stands beside its router in a model of this process. Give a profile, or rewrite while that model is "
                "there"
            )
        hidden = weight.shape[1] if weight.shape[0] == gate.num_experts else weight.shape[0]
        scale = _scale(gate.router_input, gate, program)
        found = module_dispatch(experts, hidden, weight.dtype, weight.device, scale, program.value), MODULE_ROWS
    dispatch, rows = found
    return probe_experts(dispatch, rows, gate.num_experts, gate.top_k, weight.device)


def _dispatch_of_graph(gate: Gate, program: _Program) -> tuple[Dispatch, int] | str:
    """The gate's dispatch as a function and its number of rows, or why the graph alone does not give it."""
    region = extract_dispatch(gate)
    if isinstance(region, Skip):
        return str(region)
    unknown = next((node for node in region.inputs if not program.holds(node)), None)
    if unknown is not None:
        return f"their dispatch reads {unknown.name}, which only a call has"
    sizes = [size for node in (region.ids, *region.activations) for size in nodes.shape(node) or ()]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return "their dispatch is traced for any number of tokens"
    scales = [_scale(node, gate, program) for node in region.activations]
    return region_dispatch(region, {node: program.value(node) for node in region.inputs}, scales, program.value)


def _scale(read: Node, gate: Gate, program: _Program) -> NormScale:
    """The scale of the hidden states that a gate's experts read, as far as the program holds it."""
    found = scale_at(read, gate.router_input, program.weight_name(gate))
    return found if all(program.holds(node) for node in found.parameters) else NormScale()


class _Program:
    """A GraphModule or ExportedProgram behind one face: names and values of its weights, and new buffers."""

    def __init__(self, traced: GraphModule | ExportedProgram) -> None:
        self._exported = traced if isinstance(traced, ExportedProgram) else None
        source = traced.graph_module if isinstance(traced, ExportedProgram) else traced
        self.module = _copy_module(source)
        self._buffers: dict[Node, tuple[str, torch.Tensor]] = {}

    def has_shapes(self) -> bool:
        """Whether the tracer recorded what the operations yield."""
        return any(nodes.shape(node) is not None for node in self.module.graph.nodes if node.op.startswith("call"))

    def weight_name(self, gate: Gate) -> str:
        """The fully qualified name of the gate's router weight."""
        node = gate.router_weight
        if self._exported is None:
            owner = find_owner(self.value(node)) if _NAMED_BY_MAKE_FX.fullmatch(str(node.target)) else None
            return str(node.target) if owner is None else owner.name
        signature = self._exported.graph_signature
        return _lifted(signature).get(node.name, node.name)

    def value(self, node: Node) -> Any:
        """The tensor behind a graph input or attribute that the program `holds`."""
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.module.get_submodule(owner), name)
        assert self._exported is not None
        lifted = _lifted(self._exported.graph_signature)[node.name]
        state = self._exported.state_dict
        return state[lifted] if lifted in state else self._exported.constants[lifted]

    def holds(self, node: Node) -> bool:
        """Whether a graph input or attribute is part of the program; the others only a call has."""
        return node.op == "get_attr" or (
            self._exported is not None and node.name in _lifted(self._exported.graph_signature)
        )

    def value_if_held(self, node: Node) -> Any:
        """`value`, or None for what only a call has."""
        return self.value(node) if self.holds(node) else None

    def add_buffer(self, matrix: torch.Tensor, kind: str) -> Node:
        """A graph input or attribute that holds the matrix, ahead of every computation."""
        graph = self.module.graph
        name = f"sere_{kind}_{sum(known.startswith(f'sere_{kind}_') for known, _ in self._buffers.values())}"
        if self._exported is None:
            self.module.register_buffer(name, matrix)
            with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
                node = graph.get_attr(name)
        else:
            user_inputs = set(self._exported.graph_signature.user_inputs)
            placeholders = list(graph.find_nodes(op="placeholder"))
            first_user = next((n for n in placeholders if n.name in user_inputs), None)
            anchor = first_user if first_user is not None else placeholders[-1].next
            with graph.inserting_before(anchor):
                node = graph.placeholder(f"b_{name}")
            mode = torch._guards.detect_fake_mode([n.meta.get("val") for n in placeholders])
            node.meta["val"] = mode.from_tensor(matrix, static_shapes=True) if mode is not None else matrix
        self._buffers[node] = (name, matrix)
        return node

    def remove_buffer(self, node: Node) -> None:
        """Take back `add_buffer`."""
        name, _ = self._buffers.pop(node)
        node.graph.erase_node(node)
        if self._exported is None:
            delattr(self.module, name)

    def finish(self) -> Any:
        """The rewritten program, checked."""
        self.module.graph.lint()
        self.module.recompile()
        if self._exported is None:
            return self.module
        old = self._exported
        return ExportedProgram(
            root=self.module,
            graph=self.module.graph,
            graph_signature=self._signature(old.graph_signature),
            state_dict={**old.state_dict, **dict(self._buffers.values())},
            range_constraints=copy.deepcopy(old.range_constraints),
            module_call_graph=copy.deepcopy(old.module_call_graph),
            example_inputs=old.example_inputs,
            constants=old.constants,
            verifiers=old.verifiers,
        )

    def _signature(self, old: ExportGraphSignature) -> ExportGraphSignature:
        added = {
            node.name: InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), name, persistent=True)
            for node, (name, _) in self._buffers.items()
        }
        known = {spec.arg.name: spec for spec in old.input_specs} | added
        order = [node.name for node in self.module.graph.find_nodes(op="placeholder")]
        # Ids and weights that leave the graph are named after the nodes that made them.
        returned: Any = self.module.graph.output_node().args[0]
        outputs = [
            dataclasses.replace(spec, arg=TensorArgument(name=node.name)) if isinstance(node, Node) else spec
            for spec, node in zip(old.output_specs, returned, strict=True)
        ]
        return ExportGraphSignature([known[name] for name in order], outputs)


def _copy_module(source: GraphModule) -> GraphModule:
    """A copy with a graph of its own that shares parameters and buffers."""
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(source.graph, mapping)
    graph.output(output).meta.update(source.graph.output_node().meta)
    for original, node in mapping.items():
        # A copy renames what is called like a builtin, `input` for one; signatures go by the name.
        if node.name != original.name:
            node.name = original.name
    graph._codegen = copy.deepcopy(source.graph._codegen)
    copied = GraphModule(source, graph)
    copied.meta = dict(source.meta)
    return copied


def _lifted(signature: ExportGraphSignature) -> dict[str, str]:
    """Names of lifted parameters, buffers and constants by the name of their placeholder."""
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
