"""What is computed of the model's state alone: parts of parameters, and sums and products of them."""

from __future__ import annotations

from torch.fx import Node

from . import nodes

_FAR = 24  # nodes that may stand between a parameter and what is computed of it


def computed_of_state(node: Node) -> bool:
    """Whether parameters, buffers and constants are all that a tensor is computed of, in the near."""
    pending, seen, found = [node], {node}, False
    while pending:
        reader = pending.pop()
        if reader.op in ("placeholder", "get_attr"):
            found = found or nodes.is_tensor(reader)
            if nodes.is_tensor(reader) and not nodes.is_model_state(reader):
                return False
            continue
        sources = [s for s in reader.all_input_nodes if nodes.reads_numbers(reader, s) or not nodes.is_tensor(s)]
        sources += [writer for writer in nodes.writers(reader) if writer < node]
        fresh = [source for source in sources if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
        if len(seen) > _FAR:
            return False
    return found
