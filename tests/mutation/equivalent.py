"""Mutants that compute the same as the code: a test cannot tell them apart."""

from __future__ import annotations

from .draw import Mutant

# Module, function, what the statement becomes, and why nothing changes.
EQUIVALENT: tuple[tuple[str, str, str, str], ...] = (
    (
        "passes/fuse_reroute.py",
        "fuse_reroute",
        "any((not matrix <= routed for matrix in matrices))",
        "the operator is none of its own matrices",
    ),
    (
        "ops/route/reference.py",
        "_limited_to_groups",
        "best = groups.sort(descending=True).values[..., :1 if scoring.group_score == 'max' else 2].sum(-1)",
        "a sort is along the last dimension unless it is told another",
    ),
    (
        "passes/graph/run_part.py",
        "_same_random_numbers",
        "torch.default_generator.manual_seed(1)",
        "any seed will do, as long as it is the same in each run",
    ),
    (
        "passes/evidence/router.py",
        "_has_columns_elsewhere",
        "return source is not None and isinstance(trace_router(source, columns), Router)",
        "no router has an unknown number of columns",
    ),
    (
        "ops/reroute/reference.py",
        "primary_experts",
        "rows = ids.T if token_mask is None else torch.where(token_mask, ids.T, -2)",
        "no negative number names an expert",
    ),
    (
        "ops/reroute_merged/reference.py",
        "reroute_merged_reference",
        "select_top_k <= -1 or select_top_k >= num_slots",
        "re-routing with S = 0 changes nothing either",
    ),
    (
        "passes/fuse_experts.py",
        "_routes",
        "yield few.repeat(-(-slots * len(few)))[:slots].reshape(shape)",
        "what is repeated too often is cut off",
    ),
    (
        "sere_compile/evaluation/predictions.py",
        "Predictions.of",
        "losses = -ahead.gather(2, following[..., None])[..., -1].float()",
        "there is one number a token",
    ),
    (
        "passes/count_routing.py",
        "add_counts",
        "before, after = (torch.where(real[..., None], ids, -2) for ids in (before, after))",
        "no negative number names an expert",
    ),
    (
        "sere_compile/evaluation/filling.py",
        "FillKept.__call__",
        "keeping = Keeping(self.select_top_k, self.threshold, self.min_active or 0, self.max_active)",
        "None is no budget, as 0 is",
    ),
    (
        "passes/proof/made_up.py",
        "activation_values",
        "generator = torch.Generator().manual_seed(100 + draw)",
        "any seed will do, as long as draws have their own",
    ),
    (
        "sere_compile/compiler/outside/made_up_choices.py",
        "Score.__call__",
        "return logits / (torch.rand(logits.shape, generator=generator) + 0.5).to(logits)",
        "any other scores will do",
    ),
    (
        "ops/reroute/reference.py",
        "_primary_within",
        "last = torch.maximum((sizes <= max_active).sum(0) - 1, (sizes < min_active).sum(-1))",
        "there is one dimension",
    ),
    (
        "passes/pack_gqa.py",
        "_pack",
        "scale = nodes.argument(node, 7, 'scale')",
        "attention takes its scale by name only",
    ),
    (
        "passes/fuse_experts.py",
        "_confirmed",
        "values: dict[Node, Any] = {node: random(node, matrix=len(nodes.shape(node)) == 3) if nodes.is_tensor(node) "
        "else nodes.size_in_call(node, sizes) for node in region.inputs}",
        "a tensor has sizes",
    ),
    (
        "passes/proof/ways.py",
        "rewrite_region",
        "done = reroute_dispatch(gate, matrix, RoutingSettings(0), merged=way.merged, readers=readers, tables=tables)",
        "each run sets its own S",
    ),
    (
        "passes/proof/expert_parameters.py",
        "ExpertParameters.unknown_moves",
        "here = parts[-1].holds(torch.arange(experts))",
        "a rank holds the same experts' part of each tensor",
    ),
    (
        "passes/proof/sources.py",
        "_sums_features",
        "slots = len(nodes.shape(region.gate.ids)) - 1",
        "ids have sizes",
    ),
    (
        "passes/proof/compare.py",
        "changed_rows",
        "return (difference.reshape(rows, -1) > limit).any(1).cpu()",
        "there are two dimensions",
    ),
    (
        "passes/evidence/routing_weights.py",
        "_scores_read_again",
        "node.op == 'output'",
        "behind the last reader of the scores nothing meets them: what is walked for nothing changes no answer",
    ),
    (
        "passes/graph/state.py",
        "computed_of_state",
        "sources += [writer for writer in nodes.writers(reader) if writer <= node]",
        "the node itself has been seen",
    ),
    (
        "passes/evidence/router.py",
        "_projection_factors",
        "matches and root is not None",
        "what is projected is a node: the check is the type checker's",
    ),
    (
        "ops/reroute/reference.py",
        "_primary_within",
        "unions = torch.where((slots[:, None] >= slots)[:, :, None], per_slot, -1).amax(1) > 0",
        "-1 is no more above 0 than 0 is",
    ),
    (
        "ops/reroute/reference.py",
        "named_by_comparison",
        "experts = torch.arange(num_experts, device=ids.device)",
        "whole numbers of two types compare alike",
    ),
    (
        "sere_compile/compiler/outside/made_up_choices.py",
        "made_up_order",
        "rows = torch.arange(order[..., 1].numel()).view(order.shape[:-1])",
        "each column has as many numbers, and there are two",
    ),
    (
        "sere_compile/evaluation/routing.py",
        "merge_slots",
        "named = torch.zeros(len(ids), num_experts, device=ids.device).scatter_(1, ids.long(), 3.0)",
        "any number above 0 is behind those that are not named",
    ),
    (
        "ops/reroute_merged/reference.py",
        "filled_ids",
        "none = torch.full((num_tokens, num_slots), num_experts, device=ids.device)",
        "a tensor full of a whole number is int64 unless it is told another",
    ),
    (
        "ops/reroute_merged/reference.py",
        "filled_ids",
        "fillers = torch.cat([candidates, none], 1).topk(num_slots, largest=False).values",
        "topk sorts unless it is told not to",
    ),
    (
        "passes/evidence/routing_chain.py",
        "_written",
        "read = [chain.logits, *(node for node in chain.inputs)]",
        "nobody writes to a number",
    ),
    (
        "passes/proof/expert_parameters.py",
        "Told._fits",
        "alike = self._of_shape[self._draws[-1][node].shape]",
        "all draws have the same sizes",
    ),
    (
        "passes/proof/expert_parameters.py",
        "Told._layouts",
        "sizes and sizes[0] <= self._experts and (self._experts % sizes[0] == 0) and self._is_part(node)",
        "a part of all experts is a layout that was tried already",
    ),
    (
        "passes/fuse_experts.py",
        "_why_no_candidate",
        "shapes = [list(nodes.shape(node)) for node in region.inputs if nodes.is_tensor(node)]",
        "a tensor has sizes",
    ),
    (
        "sere_compile/evaluation/rules.py",
        "Fill.__call__",
        "ids = choice.masked_fill(~primary[:, None, :], float('-inf')).topk(batch.ids.shape[-1]).indices",
        "topk is along the last dimension unless it is told another",
    ),
    (
        "sere_compile/compiler/outside/trial.py",
        "Trial.aside_of_model",
        "torch.manual_seed(1)",
        "any seed will do, as long as it is the same in each run",
    ),
    (
        "ops/reroute_merged/reference.py",
        "first_of_same",
        "return same.int().argmax(1)",
        "a slot names what another names if the other names what it does",
    ),
    (
        "passes/proof/made_up.py",
        "_moved",
        "return value + step / sign",
        "a sign is 1 or -1",
    ),
    (
        "passes/proof/expert_parameters.py",
        "Told._one_by_one",
        "shapes = [tuple(self._draws[1][node].shape) for node in left]",
        "each draw has the sizes of the first",
    ),
)

_KNOWN = {(path, function, after) for path, function, after, _ in EQUIVALENT}


def is_equivalent(mutant: Mutant) -> bool:
    """Whether this mutant is one of them."""
    return (mutant.path, mutant.function, mutant.after) in _KNOWN
