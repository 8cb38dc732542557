"""Small models of public code that is not a package: by repository and name, made of the files of a checkout.

Nothing of that code is here. `SERE_CHECKOUTS` names a folder with a git checkout of each repository, called
`owner+name`; `.ci/checkouts` says how.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from .gated import Gated, Layer, listed, rows, scattered, stacked
from .models import CAPACITY, EXPERTS, TOP_K, WIDTH, one_process

FOLDER = Path(os.environ.get("SERE_CHECKOUTS", ""))


@dataclass(frozen=True)
class Checkout:
    """One model of a repository.

    Attributes:
        repository: `owner/name` on GitHub.
        file: that holds its MoE layer.
        name: what it is.
        make: builds it.
        refused: a word of the reason where none of its gates can be re-routed, else empty.
        why: of that, in the words of the page.
        tolerance: of S = 1, relative to the largest value.
    """

    repository: str
    file: str
    name: str
    make: Callable[[], Gated]
    refused: str = ""
    why: str = ""
    tolerance: float = 1e-4

    @property
    def folder(self) -> Path:
        """Of the checkout."""
        return FOLDER / self.repository.replace("/", "+")

    @property
    def commit(self) -> str:
        """That is checked out."""
        asked = ["git", "-C", str(self.folder), "rev-parse", "--short=10", "HEAD"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


CHECKOUTS: list[Checkout] = []
_TABLE = "a softmax over a table of all experts follows the choice, and code outside the graph reads it"
# What files import at their head and no layer here uses; an installed one is found first.
UNUSED = ("debugpy", "tiktoken", "timm", "jaxtyping", "torchao", "transformers.modeling_attn_mask_utils")


def checkout(repository: str, file: str, name: str, **known: Any) -> Callable[[Callable[[Path], Gated]], None]:
    """Register a builder, which takes the checkout's folder."""

    def register(make: Callable[[Path], Gated]) -> None:
        folder = FOLDER / repository.replace("/", "+")
        CHECKOUTS.append(Checkout(repository, file, name, functools.partial(make, folder), **known))

    return register


# --- modules of a checkout --------------------------------------------------------------------------------------------


def module(folder: Path, file: str, root: str = ".") -> Any:
    """A file of a checkout as a module of its own name, with `root` as the place of what it imports.

    What it imports from there is forgotten again: many repositories have a `model` or a `moe`. Packages are entered
    without their `__init__`, which would import what only training needs.
    """
    place = folder / root
    inner = (folder / file).relative_to(place).with_suffix("")
    before = set(sys.modules)
    with _found_in(place, inner.parts[:-1]):
        found = importlib.import_module(".".join(inner.parts))
        inspected = {name: known for name, known in sys.modules.items() if name not in before}
    for name, known in inspected.items():
        if str(getattr(known, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
            # Dynamo imports the module of what it traces by its name.
            known.__name__ = re.sub(r"\W", "_", f"{folder.name}_{name}")
            sys.modules[known.__name__] = known
    return found


@contextlib.contextmanager
def _found_in(place: Path, packages: tuple[str, ...]) -> Iterator[None]:
    _with_later_versions()
    sys.path.insert(0, str(place))
    sys.meta_path.append(unused := _Unused())
    bare = []
    for depth in range(len(packages)):
        name = ".".join(packages[: depth + 1])
        bare.append(name)
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place.joinpath(*packages[: depth + 1]))]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        sys.path.remove(str(place))
        sys.meta_path.remove(unused)
        for name in bare:
            sys.modules.pop(name, None)


class _Anything(type):
    """What is imported and not used: any name of it is a class that takes whatever it is given."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _item: Any) -> Any:
        return cls


class _Nothing(metaclass=_Anything):
    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __call__(self, given: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        """As a decorator: what it is given."""
        return given


class _Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not installed, or no longer part of one that is, and that no layer here calls."""

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> Any:
        if any(name == known or name.startswith(f"{known}.") for known in UNUSED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        made = types.ModuleType(spec.name)
        made.__getattr__ = lambda name: getattr(_Nothing, name)  # type: ignore[method-assign]
        return made

    def exec_module(self, module: types.ModuleType) -> None: ...


def _with_later_versions() -> None:
    """What later versions of transformers no longer have, and what no layer here calls."""
    import transformers.models.llama.modeling_llama as llama
    import transformers.pytorch_utils
    import transformers.utils
    from transformers.utils import import_utils

    gone = {
        import_utils: ["is_torch_fx_available"],
        transformers.utils: ["is_flash_attn_greater_or_equal_2_10"],
        transformers.pytorch_utils: ["is_torch_greater_or_equal_than_1_13"],
        llama: ["LlamaFlashAttention2"],
    }
    for where, names in gone.items():
        for name in names:
            vars(where).setdefault(name, lambda *_args, **_kwargs: False)


class Stack(nn.Module):
    """Layers that add to the hidden states, and whatever else they return: losses, logits, ids."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, *further: Any) -> tuple[torch.Tensor, ...]:
        side = []
        for layer in self.layers:
            first, *others = tree_leaves(layer(x, *further))
            side += [other for other in others if isinstance(other, torch.Tensor)]
            x = x + first
        return x, *side


def twice(
    make: Callable[[], nn.Module],
    router: str,
    experts: Callable[[Any], Any],
    *,
    x: torch.Tensor | None = None,
    further: tuple[Any, ...] = (),
    scale: float = 0.3,
    top_k: int = TOP_K,
    drawn: int | None = None,
    dtype: torch.dtype | None = None,
) -> Gated:
    """Two layers of one kind, one after the other."""
    made = scattered(Stack(make(), make()), scale)
    made = made if dtype is None else made.to(dtype)
    layers = [
        Layer(f"layers.{number}.{router}", layer, experts(layer), top_k, drawn)
        for number, layer in enumerate(made.layers)
    ]
    hidden = rows(2, 5, WIDTH) if x is None else x
    return Gated(made, (hidden if dtype is None else hidden.to(dtype), *further), layers)


# --- gates over [T, E] tables -----------------------------------------------------------------------------------------


@checkout("davidmrau/mixture-of-experts", "moe.py", "two MoEs")
def davidmrau(folder: Path) -> Gated:
    found = module(folder, "moe.py")
    return twice(
        lambda: found.MoE(WIDTH, WIDTH, EXPERTS, 32, k=TOP_K), "w_gate", lambda moe: listed(moe.experts),
        x=rows(10, WIDTH), drawn=TOP_K + 1,
    )  # fmt: skip


@checkout("YeonwooSung/Pytorch_mixture-of-experts", "moe.py", "two MoEs, experts in log space")
def yeonwoosung(folder: Path) -> Gated:
    found = module(folder, "moe.py")
    return twice(
        lambda: found.MoE(WIDTH, WIDTH, EXPERTS, 32, k=TOP_K), "w_gate", lambda moe: listed(moe.experts),
        x=rows(10, WIDTH), drawn=TOP_K + 1,
    )  # fmt: skip


@checkout("UMass-Foundation-Model/Mod-Squad", "parallel_linear/parallel_experts/moe.py", "two MoEs")
def mod_squad(folder: Path) -> Gated:
    found = module(folder, "parallel_linear/parallel_experts/moe.py")

    def experts(moe: Any) -> Any:
        return stacked(moe.experts.w, moe.output_experts.w)

    return twice(
        lambda: found.MoE(WIDTH, 32, EXPERTS, TOP_K, activation=nn.GELU(), noisy_gating=False, cvloss=0.1),
        "f_gate.0.weight", experts,
    )  # fmt: skip


@checkout("IBM/ModuleFormer", "moduleformer/utils/moe.py", "two MoEs, a router of two layers")
def moduleformer(folder: Path) -> Gated:
    found = module(folder, "moduleformer/utils/moe.py")

    def experts(moe: Any) -> Any:
        return stacked(moe.experts.weight, moe.output_experts.weight)

    return twice(
        lambda: found.MoE(WIDTH, 32, EXPERTS, TOP_K, activation=nn.GELU()), "gate.w_gate.3.weight", experts
    )  # fmt: skip


@checkout("IBM/ModuleFormer", "moduleformer/utils/moe.py", "two MoEs, scores of normalised centroids")
def moduleformer_gmm(folder: Path) -> Gated:
    found = module(folder, "moduleformer/utils/moe.py")

    def experts(moe: Any) -> Any:
        return stacked(moe.experts.weight, moe.output_experts.weight)

    return twice(
        lambda: found.MoE(WIDTH, 32, EXPERTS, TOP_K, activation=nn.GELU(), gate_type="gmm"), "gate.expert_centroids",
        experts,
    )  # fmt: skip


@checkout("myshell-ai/JetMoE", "jetmoe/utils/moe.py", "two MoEs")
def jetmoe(folder: Path) -> Gated:
    found = module(folder, "jetmoe/utils/moe.py")

    def experts(moe: Any) -> Any:
        return stacked(moe.input_linear.weight, moe.output_linear.weight)

    return twice(
        lambda: found.MoE(WIDTH, 32, EXPERTS, TOP_K, activation=F.silu), "router.layer.weight", experts
    )  # fmt: skip


@checkout("pjlab-sys4nlp/llama-moe", "smoe/modules/moe/moe_layers.py", "two GLU layers, a router of two layers")
def llama_moe(folder: Path) -> Gated:
    found = module(folder, "smoe/modules/moe/moe_layers.py")

    def experts(moe: Any) -> Any:
        held = moe.calculator.experts
        return [[held.weight_gate[e], held.weight_up[e], held.weight_down[e]] for e in range(EXPERTS)]

    return twice(
        lambda: found.LinearGLUMoELayer(WIDTH, 32 * EXPERTS, WIDTH, "silu", EXPERTS, TOP_K, bias=False),
        "gate.gate_network.2.weight", experts, drawn=TOP_K + 1,
    )  # fmt: skip


# --- loops over the experts -------------------------------------------------------------------------------------------


def _deepseek_v3(folder: Path, bias: bool, **further: Any) -> Gated:
    found = module(folder, "inference/model.py", "inference")
    found.Linear.dtype = torch.float32  # its model sets it from the arguments, to what a GPU computes in
    args = found.ModelArgs(
        dim=WIDTH, inter_dim=32, moe_inter_dim=32, n_routed_experts=EXPERTS, n_activated_experts=TOP_K,
        n_shared_experts=1, **further,
    )  # fmt: skip

    def make() -> nn.Module:
        moe = found.MoE(args)
        if bias:  # the released model's, told by its size
            moe.gate.bias = nn.Parameter(torch.zeros(EXPERTS))
        return moe

    return twice(make, "gate.weight", lambda moe: listed(moe.experts))


@checkout("deepseek-ai/DeepSeek-V3", "inference/model.py", "two MoEs, softmax")
def deepseek_v3_softmax(folder: Path) -> Gated:
    return _deepseek_v3(folder, False)


@checkout("deepseek-ai/DeepSeek-V3", "inference/model.py", "two MoEs, sigmoid, groups of experts")
def deepseek_v3_groups(folder: Path) -> Gated:
    return _deepseek_v3(
        folder, True, score_func="sigmoid", n_expert_groups=4, n_limited_groups=2, route_scale=2.5
    )  # fmt: skip


def _deepseek_vl2(folder: Path, **further: Any) -> Gated:

    found = module(folder, "deepseek_vl2/models/modeling_deepseek.py")
    config = found.DeepseekV2Config(
        hidden_size=WIDTH, intermediate_size=32, moe_intermediate_size=32, n_routed_experts=EXPERTS,
        n_shared_experts=2, num_experts_per_tok=TOP_K, **further,
    )  # fmt: skip
    return twice(lambda: found.DeepseekV2MoE(config), "gate.weight", lambda moe: listed(moe.experts))


_VL2 = "deepseek_vl2/models/modeling_deepseek.py"


@checkout("deepseek-ai/DeepSeek-VL2", _VL2, "two MoEs, greedy")
def deepseek_vl2(folder: Path) -> Gated:
    return _deepseek_vl2(folder, topk_method="greedy")


@checkout("deepseek-ai/DeepSeek-VL2", _VL2, "two MoEs, greedy in groups")
def deepseek_vl2_groups(folder: Path) -> Gated:
    return _deepseek_vl2(
        folder, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    )  # fmt: skip


@checkout("deepseek-ai/DeepSeek-VL2", _VL2, "two MoEs, sigmoid with a bias of the choice")
def deepseek_vl2_noaux(folder: Path) -> Gated:
    return _deepseek_vl2(
        folder, topk_method="noaux_tc", n_group=4, topk_group=2, scoring_func="sigmoid", norm_topk_prob=True
    )  # fmt: skip


@checkout("TeaPoly/DeepSeekV3MoE", "moe.py", "two layers, sigmoid with a bias of the choice, groups")
def teapoly(folder: Path) -> Gated:
    found = module(folder, "moe.py")
    return twice(
        lambda: found.DeepSeekV3MoELayer(
            WIDTH, 32, 0.0, n_expert=EXPERTS, n_expert_activated=TOP_K, n_expert_groups=4, n_limited_groups=2,
            activation=nn.SiLU(),
        ),
        "gate.weight", lambda moe: listed(moe.experts),
    )  # fmt: skip


@checkout("AviSoori1x/makeMoE", "makeMoE.py", "two SparseMoEs", refused="another function", why=_TABLE)
def make_moe(folder: Path) -> Gated:
    with _in_folder_with(folder, "input.txt"):
        found = module(folder, "makeMoE.py")
    return twice(
        lambda: found.SparseMoE(WIDTH, EXPERTS, TOP_K), "router.topkroute_linear.weight",
        lambda moe: listed(moe.experts), scale=0.5,
    )  # fmt: skip


@contextlib.contextmanager
def _in_folder_with(folder: Path, name: str) -> Iterator[None]:
    """A script reads its data when it is imported."""
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        known = folder / name
        Path(made, name).write_text(known.read_text("utf-8") if known.exists() else "abc " * 100, encoding="utf-8")
        with contextlib.chdir(made):
            yield


@checkout("rasbt/LLMs-from-scratch", "ch04/07_moe/gpt_with_kv_moe.py", "two feed-forwards of chapter 4")
def raschka_chapter(folder: Path) -> Gated:
    found = module(folder, "ch04/07_moe/gpt_with_kv_moe.py", "ch04/07_moe")
    config = {"emb_dim": WIDTH, "hidden_dim": 32, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    return twice(lambda: found.MoEFeedForward(config), "gate.weight", _three_lists)


@checkout("rasbt/LLMs-from-scratch", "pkg/llms_from_scratch/qwen3.py", "two feed-forwards of Qwen3")
def raschka_qwen3(folder: Path) -> Gated:
    found = module(folder, "pkg/llms_from_scratch/qwen3.py", "pkg")
    config = {
        "emb_dim": WIDTH, "moe_intermediate_size": 32, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
        "dtype": torch.float32,
    }  # fmt: skip
    return twice(lambda: found.MoEFeedForward(config), "gate.weight", _three_lists)


def _three_lists(moe: Any) -> Any:
    return [[moe.fc1[e].weight, moe.fc2[e].weight, moe.fc3[e].weight] for e in range(EXPERTS)]


@checkout("jingyaogong/minimind", "model/model_minimind.py", "two MOEFeedForwards")
def minimind(folder: Path) -> Gated:
    found = module(folder, "model/model_minimind.py")
    config = found.MiniMindConfig(
        hidden_size=WIDTH, moe_intermediate_size=32, num_experts=EXPERTS, num_experts_per_tok=TOP_K, use_moe=True
    )  # fmt: skip
    return twice(lambda: found.MOEFeedForward(config), "gate.weight", lambda moe: listed(moe.experts))


@checkout(
    "inclusionAI/Ling", "models/modeling_bailing_moe.py", "two MoE blocks", refused="returns other things",
    why="the ids that its experts get are what it returns",
)  # fmt: skip
def ling(folder: Path) -> Gated:

    found = module(folder, "models/modeling_bailing_moe.py")
    config = found.BailingMoeConfig(
        hidden_size=WIDTH, intermediate_size=32, moe_intermediate_size=32, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, num_shared_experts=1, use_bias=False,
    )  # fmt: skip
    return twice(lambda: found.BailingMoeSparseMoeBlock(config), "gate.weight", lambda moe: listed(moe.experts))


@checkout("Time-MoE/Time-MoE", "time_moe/models/modeling_time_moe.py", "two sparse layers")
def time_moe(folder: Path) -> Gated:

    found = module(folder, "time_moe/models/modeling_time_moe.py")
    config = found.TimeMoeConfig(
        hidden_size=WIDTH, intermediate_size=96, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        num_attention_heads=2, horizon_lengths=[1],
    )  # fmt: skip
    return twice(lambda: found.TimeMoeSparseExpertsLayer(config), "gate.weight", lambda moe: listed(moe.experts))


@checkout("epfml/llm-baselines", "src/models/moe.py", "two MoEs, softmax behind the choice")
def llm_baselines(folder: Path) -> Gated:
    return _llm_baselines(folder, "topk_softmax", 0)


@checkout("epfml/llm-baselines", "src/models/moe.py", "two MoEs, a shared expert among them")
def llm_baselines_shared(folder: Path) -> Gated:
    return _llm_baselines(folder, "softmax_topk", 1)


class _WithNothing(nn.Sequential):
    """A feed-forward that returns a second thing, as the repository's own do."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), {}


def _llm_baselines(folder: Path, order: str, shared: int) -> Gated:
    found = module(folder, "src/models/moe.py", "src")
    config = SimpleNamespace(
        n_embd=WIDTH, moe_num_experts=EXPERTS + shared, moe_num_shared_experts=shared, moe_num_experts_per_tok=TOP_K,
        moe_softmax_order=order,
    )  # fmt: skip

    def expert(config: Any) -> nn.Module:
        return _WithNothing(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    return twice(
        lambda: found.MoE(config, expert), "router.weight", lambda moe: listed(moe.experts)[shared:]
    )  # fmt: skip


@checkout("epfml/llm-baselines", "src/models/moe.py", "two ExpertChoiceMoEs", refused="tokens",
    why="its experts choose tokens: no token chooses experts",
)  # fmt: skip
def llm_baselines_choice(folder: Path) -> Gated:
    found = module(folder, "src/models/moe.py", "src")
    config = SimpleNamespace(
        n_embd=WIDTH, moe_num_experts=EXPERTS, moe_softmax_order="softmax_topk", capacity_factor=TOP_K, batch_size=2,
        sequence_length=8,
    )  # fmt: skip

    def expert(config: Any) -> nn.Module:
        return _WithNothing(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    return twice(
        lambda: found.ExpertChoiceMoE(config, expert), "router.weight", lambda moe: listed(moe.experts),
        x=rows(2, 8, WIDTH),
    )  # fmt: skip


@checkout("ES7/Mistral-AI-from-Scratch", "moe.py", "two MoeLayers")
def es7(folder: Path) -> Gated:
    found = module(folder, "moe.py")
    return twice(
        lambda: found.MoeLayer(
            [nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)], nn.Linear(WIDTH, EXPERTS, bias=False),
            found.MoeArgs(EXPERTS, TOP_K),
        ),
        "gate.weight", lambda moe: listed(moe.experts), x=rows(10, WIDTH),
    )  # fmt: skip


def _kowsher(folder: Path, name: str) -> Gated:
    found = module(folder, "moe.py")
    config = SimpleNamespace(
        hidden_size=WIDTH, intermediate_size=32, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
        num_experts_per_seq=TOP_K, router_jitter_noise=0.0,
    )  # fmt: skip
    return twice(
        lambda: getattr(found, name)(config), "gate.weight", lambda moe: listed(moe.experts), x=rows(6, 4, WIDTH),
        scale=0.5,
    )  # fmt: skip


@checkout("Kowsher/SparseMoE-Layer", "moe.py", "two SparseMoeBlocks")
def kowsher(folder: Path) -> Gated:
    return _kowsher(folder, "SparseMoeBlock")


@checkout("Kowsher/SparseMoE-Layer", "moe.py", "two SequenceSparseMoeBlocks: a sequence chooses")
def kowsher_sequence(folder: Path) -> Gated:
    return _kowsher(folder, "SequenceSparseMoeBlock")


@checkout("SkAndMl/moonlight-moe", "moe.py", "two MoEs", refused="is off by", why=CAPACITY)
def moonlight(folder: Path) -> Gated:
    found = module(folder, "moe.py")
    config = SimpleNamespace(
        embed_dim=WIDTH, ffn_dim=32, n_experts=EXPERTS, k=TOP_K, capacity_factor=1.25, alpha_aux_loss=0.1
    )  # fmt: skip
    return twice(lambda: found.MoE(config), "router.W.weight", lambda moe: listed(moe.experts))


@checkout("feizc/DiT-MoE", "models.py", "two sparse blocks")
def dit_moe(folder: Path) -> Gated:
    found = module(folder, "models.py")
    return twice(
        lambda: found.SparseMoeBlock(WIDTH, 2, EXPERTS, TOP_K), "gate.weight", lambda moe: listed(moe.experts)
    )  # fmt: skip


@checkout("SalesforceAIResearch/uni2ts", "src/uni2ts/module/ffn.py", "two MoEs, the farthest centroids of a table")
def uni2ts(folder: Path) -> Gated:
    found = module(folder, "src/uni2ts/module/ffn.py", "src")

    class AroundCentroids(nn.Module):
        """Its encoder layer holds a centroid per expert and passes it on."""

        def __init__(self) -> None:
            super().__init__()
            self.ffn = found.MoEFeedForward(EXPERTS, TOP_K, WIDTH, 32, WIDTH, bias=False)
            self.centroid = nn.Parameter(rows(EXPERTS, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ffn(x, self.centroid)

    return twice(AroundCentroids, "centroid", lambda layer: listed(layer.ffn.experts))


@checkout("TUDB-Labs/MoE-PEFT", "moe_peft/adapters/mola/model.py", "two MoLA linears, LoRA experts")
def mola(folder: Path) -> Gated:
    found = module(folder, "moe_peft/adapters/mola/model.py")
    config = SimpleNamespace(adapter_name="a", num_experts_=EXPERTS, top_k_=TOP_K, router_init_range_=5.0)

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

        def lora_forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    class Held(nn.Module):
        """The repository's own linear holds its adapters in a dictionary; its base class is a quantised one."""

        def __init__(self) -> None:
            super().__init__()
            self.moe = found.MolaSparseMoe(WIDTH, torch.device("cpu"), config)
            self.gate = self.moe.gate_
            self.adapters = nn.ModuleList(Low() for _ in range(EXPERTS))
            self.out_features_ = WIDTH
            self.loras_ = {f"moe.a.experts.{e}": self.adapters[e] for e in range(EXPERTS)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe.forward(x, x, self)

    return twice(Held, "gate.weight", lambda layer: listed(layer.adapters))


# --- stacked experts --------------------------------------------------------------------------------------------------


@checkout("openai/gpt-oss", "gpt_oss/torch/model.py", "two MLP blocks", tolerance=1e-2)
def gpt_oss(folder: Path) -> Gated:
    found = module(folder, "gpt_oss/torch/model.py")
    config = found.ModelConfig(
        num_experts=EXPERTS, experts_per_token=TOP_K, hidden_size=WIDTH, intermediate_size=32
    )  # fmt: skip

    def experts(block: Any) -> Any:
        return stacked(block.mlp1_weight, block.mlp1_bias, block.mlp2_weight, block.mlp2_bias)

    return twice(
        lambda: found.MLPBlock(config), "gate.weight", experts, x=rows(10, WIDTH), dtype=torch.bfloat16, scale=1.0
    )  # fmt: skip


@checkout("pytorch-labs/gpt-fast", "mixtral-moe/model.py", "two MOEFeedForwards of Mixtral")
def gpt_fast(folder: Path) -> Gated:
    found = module(folder, "mixtral-moe/model.py", "mixtral-moe")
    config = SimpleNamespace(dim=WIDTH, num_experts=EXPERTS, intermediate_size=32, num_activated_experts=TOP_K)

    class Flat(nn.Module):
        """Its transformer block passes hidden states [1, T, D] and gets [T, D]."""

        def __init__(self) -> None:
            super().__init__()
            self.moe = found.MOEFeedForward(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe(x)

    return twice(Flat, "moe.gate.weight", lambda layer: stacked(*layer.moe.cond_ffn.parameters()), x=rows(10, WIDTH))


@checkout("meta-llama/llama-models", "models/llama4/moe.py", "two MoEs: every expert takes every token, scaled",
    refused="pass through another function",
    why="its weights pass a sigmoid behind the dispatch, and scale what goes into the experts",
)  # fmt: skip
def llama4(folder: Path) -> Gated:
    import fairscale.nn.model_parallel.initialize as parallel

    one_process()
    if not parallel.model_parallel_is_initialized():
        parallel.initialize_model_parallel(1)
    found = module(folder, "models/llama4/moe.py")
    args = SimpleNamespace(num_experts=EXPERTS, top_k=TOP_K, auto_scale_F=False, capacity_factor=1.0)
    return twice(
        lambda: found.MoE(WIDTH, 48, 1.0, 8, args), "router_DE", lambda moe: stacked(*moe.experts.parameters())
    )  # fmt: skip


def _flat_stacks(experts: Any) -> Any:
    """Experts in stacks [E * F, H]."""
    stacks = [parameter.view(EXPERTS, -1, parameter.shape[-1]) for parameter in experts.mlp.parameters()]
    return stacked(*stacks)


@checkout("databricks/dbrx", "model/modeling_dbrx.py", "two feed-forwards, experts in 2-D stacks")
def dbrx(folder: Path) -> Gated:
    found = module(folder, "model/modeling_dbrx.py")
    config = found.DbrxFFNConfig(
        ffn_hidden_size=32, moe_num_experts=EXPERTS, moe_top_k=TOP_K, moe_normalize_expert_weights=1
    )  # fmt: skip
    return twice(
        lambda: found.DbrxFFN(WIDTH, config), "router.layer.weight", lambda ffn: _flat_stacks(ffn.experts)
    )  # fmt: skip


def _llm_foundry(folder: Path, kind: str) -> Gated:
    found = module(folder, "llmfoundry/models/layers/dmoe.py")
    return twice(
        lambda: found.dMoE(
            None, hidden_size=WIDTH, ffn_hidden_size=32, moe_num_experts=EXPERTS, moe_top_k=TOP_K, mlp_type=kind,
            moe_normalize_expert_weights=1,
        ),
        "router.layer.weight", lambda moe: _flat_stacks(moe.experts),
    )  # fmt: skip


@checkout("mosaicml/llm-foundry", "llmfoundry/models/layers/dmoe.py", "two dMoEs, experts in 2-D stacks")
def llm_foundry(folder: Path) -> Gated:
    return _llm_foundry(folder, "mlp")


@checkout("mosaicml/llm-foundry", "llmfoundry/models/layers/dmoe.py", "two dMoEs with GLU experts in 2-D stacks")
def llm_foundry_glu(folder: Path) -> Gated:
    return _llm_foundry(folder, "glu")


# --- places in buffers ------------------------------------------------------------------------------------------------


@checkout("Tencent/Tencent-Hunyuan-Large", "models/modeling_hunyuan.py", "two MoEs, a buffer for every token")
def hunyuan(folder: Path) -> Gated:

    found = module(folder, "models/modeling_hunyuan.py")
    config = SimpleNamespace(
        hidden_size=WIDTH, intermediate_size=32, num_experts=EXPERTS, moe_topk=TOP_K, moe_drop_tokens=False,
        moe_random_routing_dropped_token=False, use_mixed_mlp_moe=True, num_shared_expert=1, hidden_act="silu",
        pretraining_tp=1,
    )  # fmt: skip
    return twice(lambda: found.HunYuanMoE(config), "gate.wg.weight", lambda moe: listed(moe.experts))


@checkout("wolfecameron/nanoMoE", "model.py", "two MOELayers", refused="capacity", why=CAPACITY)
def nano_moe(folder: Path) -> Gated:
    found = module(folder, "model.py")
    config = found.GPTConfig(n_embd=WIDTH, n_exp=EXPERTS, top_k=TOP_K, dropout=0.0, bias=False)
    config.use_noisy_top_k = config.use_aux_loss = config.use_router_z_loss = False
    return twice(
        lambda: found.MOELayer(config), "router.w_g.weight", lambda moe: stacked(*moe.experts.parameters()),
        x=rows(2, 8, WIDTH),
    )  # fmt: skip


@checkout("decisionintelligence/pathformer", "layers/AMS.py", "an AMS: experts of several patch sizes",
    refused="is off by", why="its experts differ in size: none can take the place of another",
)  # fmt: skip
def pathformer(folder: Path) -> Gated:
    found = module(folder, "layers/AMS.py")
    made = scattered(found.AMS(24, 24, 4, "cpu", num_nodes=3, d_model=4, d_ff=8, k=2, layer_number=1))
    return Gated(made, (rows(6, 24, 3, 4),), [Layer("w_gate.weight", made, [[]] * 4, 2, 3)])
