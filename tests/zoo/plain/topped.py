"""A small model whose scores end in softmax and top-k, in one program with it, and what the backend makes of it."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from sere_compile import SereConfig
from sere_compile.backend import SereBackend

from .calls import arguments
from .discover import TASKS, ModelClass
from .small import TRIES, Sizes, scatter_weights, small_config

LARGEST = 50_000_000  # parameters of what still counts as small
# What there are as many labels as, and sizes that make that number the only one of its kind.
KINDS = {
    "layers": Sizes(layers=4, heads=2, channels=16, words=96, length=6),
    "heads": Sizes(layers=2, heads=6, channels=48, words=96, length=5),
    "channels": Sizes(layers=2, heads=4, channels=32, words=96, length=6),
}


class NotSmallError(Exception):
    """A class that no try builds small, or that does not run."""


class Topped(nn.Module):
    """A model, and softmax and top-k of its scores: what a service returns of a classifier."""

    def __init__(self, model: nn.Module, scores: Sequence[str], top_k: int) -> None:
        super().__init__()
        self.model, self.scores, self.top_k = model, scores, top_k

    def forward(self, **call: Any) -> list[torch.Tensor]:
        """Values and places of the best K of each output's last dimension."""
        output = self.model(**call)
        found = [output[name] for name in self.scores if isinstance(output.get(name), torch.Tensor)]
        return [tensor for scores in found for tensor in scores.softmax(-1).topk(self.top_k)]


@dataclass(frozen=True)
class Case:
    """A small model with its call.

    Attributes:
        model: with its top-k.
        call: keyword arguments.
        kind: what there are as many labels as.
        number: of labels.
    """

    model: Topped
    call: dict[str, Any]
    kind: str
    number: int


def build(made: ModelClass) -> Case:
    """A small model of a class with as many labels as layers, heads or channels: one of them, by its name.

    Raises:
        NotSmallError: with why each try failed.
        ImportError: it needs another package.
    """
    chance = zlib.crc32(made.name.encode())
    kinds = list(KINDS)[chance % 3 :] + list(KINDS)[: chance % 3]
    reasons: dict[str, None] = {}
    for kept in TRIES:
        for kind in kinds:
            try:
                return _build(made, kind, kept, 2 + chance // 3 % 2)
            except ImportError:
                raise
            except Exception as error:  # noqa: BLE001 (what sizes that do not fit raise has no common class)
                reasons[f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:100]}"] = None
    raise NotSmallError("; ".join(list(reasons)[:2]))


def _build(made: ModelClass, kind: str, kept: tuple[str, ...], top_k: int) -> Case:
    sizes, task = KINDS[kind], TASKS[made.task]
    number = _number(small_config(made.config, sizes, kept), kind)
    if task.counted == "words":
        sizes = Sizes(sizes.layers, sizes.heads, sizes.channels, number, sizes.length)
    elif task.counted != "labels":
        sizes = Sizes(sizes.layers, sizes.heads, sizes.channels, sizes.words, number)
    config = small_config(made.config, sizes, kept)
    if task.counted == "labels":
        config.num_labels = number
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in made.model(config).parameters())
    if parameters > LARGEST:
        raise NotSmallError(f"{parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = Topped(scatter_weights(made.model(config)), task.scores, top_k)
    call = arguments(made, model.model, sizes)
    with torch.no_grad():
        found = model(**call)
    if not found:
        raise NotSmallError(f"none of {task.scores} among its outputs")
    return Case(model.eval(), call, kind, number)


def _number(config: Any, kind: str) -> int:
    """How many layers, heads or channels there are.

    Raises:
        NotSmallError: it has none, or one.
    """
    names = {
        "layers": ("num_hidden_layers", "num_layers", "encoder_layers", "depths"),
        "heads": ("num_attention_heads", "num_heads"),
        "channels": ("hidden_size", "d_model", "hidden_sizes", "embed_dims", "embed_dim", "hidden_dim"),
    }
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for name in names[kind]:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = len(value) if kind == "layers" else value[-1]
            if isinstance(value, int) and value >= 4:
                return value
    raise NotSmallError(f"no number of {kind}")


@dataclass
class Verdict:
    """What the backend did to a model.

    Attributes:
        differs: results that are not, bit for bit, those of the graphs as traced.
        rewritten: nodes with an operator of ours.
        told: warnings about gates, of which there are none.
        graphs: how many Dynamo made.
    """

    differs: list[int] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    graphs: int = 0

    @property
    def untouched(self) -> bool:
        """Whether nothing was done, and no gate was named."""
        return not (self.differs or self.rewritten or self.told)


class _Both(logging.Handler):
    """A backend that compiles each graph as it is and with default options, and hears what is said of gates."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(logging.WARNING)
        self.verdict, self.ours = verdict, True

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "found no MoE gate" not in text:
            self.verdict.told.append(text)

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.verdict.graphs += 1
        made = {False: module.forward, True: SereBackend(SereConfig(inner=self._inner))(module, example_inputs)}
        return lambda *arguments: made[self.ours](*arguments)

    def _inner(self, graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        ours = [str(node) for node in graph.graph.nodes if str(node.target).startswith("sere")]
        self.verdict.rewritten += ours
        return graph.forward


def judge(case: Case) -> Verdict:
    """Compile a model with default options and compare, twice: some things are said at a second call.

    Raises:
        What compiling it raises.
    """
    verdict = Verdict()
    both = _Both(verdict)
    logger = logging.getLogger("sere_compile")
    logger.addHandler(both)
    compiled = torch.compile(case.model, backend=both)
    try:
        with torch.no_grad():
            ours = [_seeded(compiled, case.call) for _ in range(2)]
            both.ours = False
            plain = _seeded(compiled, case.call)
    finally:
        logger.removeHandler(both)
    for results in ours:
        verdict.differs += [
            number
            for number, (ours, own) in enumerate(zip(results, plain, strict=True))
            if not torch.equal(ours.nan_to_num(), own.nan_to_num())
        ]
    return verdict


def _seeded(model: Any, call: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return model(**call)
