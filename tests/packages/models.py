"""Small models of public packages, whole where that is cheap: by package and name, made when asked for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .gated import Gated, Layer, listed, rows, scattered, stacked, tokens

EXPERTS, TOP_K, WIDTH = 8, 3, 16


@dataclass(frozen=True)
class Model:
    """One model of a package.

    Attributes:
        package: as pip calls it.
        name: what it is.
        make: builds it.
        refused: a word of the reason where none of its gates can be re-routed, else empty.
        why: of that, in the words of the page.
        tolerance: of S = 1, relative to the largest value: some packages compute in bfloat16.
    """

    package: str
    name: str
    make: Callable[[], Gated]
    refused: str = ""
    why: str = ""
    tolerance: float = 1e-4


MODELS: list[Model] = []
MASKED = "one mask of the ids sends tokens and picks their scores: new ids would change the weights"
CAPACITY = "an expert takes as many tokens as fit: re-routed ones would push out others"


def model(package: str, name: str, **known: Any) -> Callable[[Callable[[], Gated]], Callable[[], Gated]]:
    """Register a builder."""

    def register(make: Callable[[], Gated]) -> Callable[[], Gated]:
        MODELS.append(Model(package, name, make, **known))
        return make

    return register


def one_process() -> None:
    """Packages for many machines ask for their group even on one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


# --- litgpt -----------------------------------------------------------------------------------------------------------


def _litgpt(**further: Any) -> Gated:
    from litgpt.model import GPT, Config

    made = scattered(GPT(Config(
        block_size=16, vocab_size=96, padded_vocab_size=96, n_layer=2, n_head=4, n_embd=32, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMoE",
        intermediate_size=48, moe_intermediate_size=48, n_expert=EXPERTS, n_expert_per_token=TOP_K, **further,
    )))  # fmt: skip
    layers = [
        Layer(f"transformer.h.{number}.mlp.gate.weight", block.mlp, listed(block.mlp.experts), TOP_K)
        for number, block in enumerate(made.transformer.h)
    ]
    return Gated(made, (tokens(96, 2, 5),), layers)


@model("litgpt", "GPT, as Mixtral")
def litgpt_mixtral() -> Gated:
    return _litgpt()


@model("litgpt", "GPT, as DeepSeek-V3")
def litgpt_deepseek() -> Gated:
    return _litgpt(
        n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2, n_shared_expert=1, norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )  # fmt: skip


# --- mistral-inference ------------------------------------------------------------------------------------------------


@model("mistral-inference", "two MoeLayers")
def mistral_inference() -> Gated:
    from mistral_inference.moe import MoeArgs, MoeLayer

    made = scattered(nn.Sequential(*(
        MoeLayer(
            [nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)],
            nn.Linear(WIDTH, EXPERTS, bias=False),
            MoeArgs(EXPERTS, TOP_K),
        )
        for _ in range(2)
    )))  # fmt: skip
    return Gated(made, (rows(10, WIDTH),), _in_order(made, "gate.weight", lambda layer: listed(layer.experts)))


def _in_order(made: nn.Module, router: str, experts: Callable[[Any], Any], top_k: int = TOP_K) -> list[Layer]:
    """The gates of modules that stand in a sequence."""
    return [Layer(f"{name}.{router}", layer, experts(layer), top_k) for name, layer in made.named_children()]


# --- torchtitan -------------------------------------------------------------------------------------------------------


def _torchtitan(experts: Any = None, dtype: torch.dtype = torch.float32, **router: Any) -> Gated:
    from torchtitan.models.common import moe
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    kind = experts or moe.GroupedExperts
    config = moe.MoE.Config(
        num_experts=EXPERTS,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=kind.Config(dim=WIDTH, hidden_dim=32, num_experts=EXPERTS),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, gate=moe.Linear.Config(in_features=WIDTH, out_features=EXPERTS), top_k=TOP_K, **router
        ),
    )
    made = scattered(nn.Sequential(config.build(), config.build()), 0.5).to(dtype)
    layers = _in_order(made, "router.gate.weight", lambda moe: stacked(*moe.routed_experts.inner_experts.parameters()))
    return Gated(made, (rows(2, 5, WIDTH).to(dtype),), layers)


@model("torchtitan", "two MoE layers, sigmoid", tolerance=3e-2)
def torchtitan_sigmoid() -> Gated:
    return _torchtitan()


@model("torchtitan", "two MoE layers, softmax, normalised", tolerance=3e-2)
def torchtitan_softmax() -> Gated:
    return _torchtitan(score_func="softmax", route_norm=True, route_scale=2.0)


@model("torchtitan", "two MoE layers, groups of experts", tolerance=3e-2)
def torchtitan_groups() -> Gated:
    return _torchtitan(num_expert_groups=2, num_limited_groups=1)


@model("torchtitan", "two MoE layers of gpt-oss", tolerance=3e-2)
def torchtitan_gpt_oss() -> Gated:
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    return _torchtitan(GptOssGroupedExperts, torch.bfloat16, score_func="softmax")


# --- ibm-fms ----------------------------------------------------------------------------------------------------------


def _fms(made: nn.Module, blocks: Any, top_k: int) -> Gated:
    scattered(made)
    inner = [(number, block.ff_sub_layer) for number, block in enumerate(blocks)]
    name = next(name for name, module in made.named_modules() if module is blocks)
    layers = [
        Layer(f"{name}.{number}.ff_sub_layer.gate.weight", moe, stacked(*moe.cond_ffn.parameters()), top_k)
        for number, moe in inner
    ]
    return Gated(made, (tokens(96, 2, 5),), layers)


@model("ibm-fms", "Mixtral")
def fms_mixtral() -> Gated:
    from fms.models.mixtral import Mixtral, MixtralConfig

    config = MixtralConfig(
        src_vocab_size=96, dim=32, nheads=4, kvheads=2, nlayers=2, hidden_dim=48, num_experts=EXPERTS,
        top_k_experts=TOP_K, max_expected_seq_len=64,
    )  # fmt: skip
    made = Mixtral(config)
    return _fms(made, made.base_model.layers, TOP_K)


@model("ibm-fms", "gpt-oss")
def fms_gpt_oss() -> Gated:
    from fms.models.gpt_oss import GptOss, GptOssConfig

    config = GptOssConfig(
        num_experts=EXPERTS, src_vocab_size=96, emb_dim=32, head_dim=64, num_attention_heads=2, nheads=2, kvheads=1,
        nlayers=2, layer_types=["sliding_attention", "full_attention"], pad_id=0,
    )  # fmt: skip
    made = GptOss(config)
    return _fms(made, made.base_model.layers, config.top_k_experts)


# --- megatron-core ----------------------------------------------------------------------------------------------------


def _megatron(**further: Any) -> Gated:
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    class OnCpu(TopKRouter):
        """A router that leaves its weights where they are: the package's own moves them to a GPU at each call."""

        def gating(self, input: torch.Tensor) -> torch.Tensor:
            return moe_utils.router_gating_linear(input, self.weight, self.bias, input.dtype)

    vars(moe_utils).setdefault("te_general_gemm", None)  # asked for, and only set where another package is installed
    one_process()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2, hidden_size=WIDTH, num_attention_heads=4, ffn_hidden_size=32, moe_ffn_hidden_size=32,
        num_moe_experts=EXPERTS, moe_router_topk=TOP_K, add_bias_linear=False, use_cpu_initialization=True,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, bias_activation_fusion=False,
        moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="none", **further,
    )  # fmt: skip
    spec = get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=EXPERTS)
    spec.submodules.router = OnCpu
    made = scattered(_First([build_module(spec, config) for _ in range(2)]), 0.5)
    layers = [
        Layer(f"layers.{number}.router.weight", layer, listed(layer.experts.local_experts), TOP_K)
        for number, layer in enumerate(made.layers)
    ]
    return Gated(made, (rows(5, 2, WIDTH),), layers)


class _First(nn.Module):
    """Layers one after the other, each called with what the one before it returned first."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


@model("megatron-core", "two MoELayers, softmax")
def megatron_softmax() -> Gated:
    return _megatron()


@model("megatron-core", "two MoELayers, sigmoid")
def megatron_sigmoid() -> Gated:
    return _megatron(moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.0)


# --- deepspeed --------------------------------------------------------------------------------------------------------


def _deepspeed(top_k: int, **further: Any) -> Gated:
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.moe.layer import MoE

        expert = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        made = scattered(_First([MoE(WIDTH, expert, EXPERTS, k=top_k, **further) for _ in range(2)]), 0.5)
    layers = [
        Layer(
            f"layers.{number}.deepspeed_moe.gate.wg.weight",
            layer,
            listed(layer.deepspeed_moe.experts.deepspeed_experts),
            top_k,
        )
        for number, layer in enumerate(made.layers)
    ]
    return Gated(made, (rows(2, 8, WIDTH),), layers)


@model("deepspeed", "two MoEs, top-2", refused="capacity", why=CAPACITY)
def deepspeed_top2() -> Gated:
    return _deepspeed(2, top2_2nd_expert_sampling=False)


@model("deepspeed", "two MoEs, top-3", refused="reads the scores again", why=MASKED)
def deepspeed_top3() -> Gated:
    return _deepspeed(3)


@model("deepspeed", "two MoEs, top-3 without a limit", refused="reads the scores again", why=MASKED)
def deepspeed_no_drop() -> Gated:
    return _deepspeed(3, drop_tokens=False)


@model("deepspeed", "AutoEP of a Mixtral of transformers")
def deepspeed_auto_ep() -> Gated:
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig
    from transformers import MixtralConfig, MixtralForCausalLM

    one_process()
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, use_cache=False,
    )  # fmt: skip
    made = MixtralForCausalLM(config)
    tool = AutoEP(made, AutoEPConfig(enabled=True, autoep_size=1, use_grouped_mm=False, load_balance_coeff=None))
    for spec in tool.ep_parser():  # its bookkeeping of recorded outputs knows transformers 4 alone
        tool._replace_moe_layer_without_retarget(spec, 1, 0, False)
    scattered(made)
    layers = [
        Layer(
            f"model.layers.{number}.mlp.router.gate.weight", layer.mlp, stacked(*layer.mlp.experts.parameters()), TOP_K
        )
        for number, layer in enumerate(made.model.layers)
    ]
    return Gated(_Logits(made), (tokens(96, 2, 5),), [_inside("model", layer) for layer in layers])


class _Logits(nn.Module):
    """A model of transformers of which the logits alone are asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def _inside(name: str, layer: Layer) -> Layer:
    return Layer(f"{name}.{layer.router}", layer.around, layer.experts, layer.top_k)


# --- diffusers --------------------------------------------------------------------------------------------------------


@model("diffusers", "two MoE feed-forwards of HiDream")
def hidream() -> Gated:
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    made = scattered(nn.Sequential(*(MOEFeedForwardSwiGLU(WIDTH, 32, EXPERTS, TOP_K) for _ in range(2))), 0.2)
    return Gated(made, (rows(2, 5, WIDTH),), _in_order(made, "gate.weight", lambda layer: listed(layer.experts)))


@model("diffusers", "MoE layer of Nucleus", refused="tokens", why="its experts choose tokens: no token chooses experts")
def nucleus() -> Gated:
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer

    layer = NucleusMoELayer(WIDTH, 32, EXPERTS, 2.0, True, 1.0)
    made = scattered(layer, 0.2)
    return Gated(made, (rows(2, 8, WIDTH), rows(2, 8, 2 * WIDTH)), [Layer("gate.weight", made, [[]] * EXPERTS, TOP_K)])


# --- mergoo -----------------------------------------------------------------------------------------------------------


@model("mergoo", "the MLP of a composed Llama")
def mergoo_mlp() -> Gated:
    from mergoo.models.modeling_llama import LlamaMLP
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=32, num_attention_heads=4)
    config.pretraining_tp = 1
    config.router_layers_index, config.router_layers = [0], ["gate_proj", "up_proj", "down_proj"]
    config.num_experts, config.num_experts_per_tok = EXPERTS, TOP_K
    made = scattered(LlamaMLP(config, 0), 0.4)
    layers = [
        Layer(f"{name}.gate.weight", getattr(made, name), listed(getattr(made, name).experts), TOP_K)
        for name in config.router_layers
    ]
    return Gated(made, (rows(2, 5, WIDTH),), layers)


@model("mergoo", "adapters of a composed Llama")
def mergoo_adapters() -> Gated:
    from mergoo.compose_layers import LoRAMoeLayer

    config = nn.Module()
    config.num_experts, config.num_experts_per_tok, config.hidden_size = EXPERTS, TOP_K, WIDTH
    adapter = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": True, "use_rslora": False}
    config.adapter_configs = [adapter | {"use_dora": False}] * EXPERTS
    made = LoRAMoeLayer(config, WIDTH, WIDTH, bias=False)
    del made.config
    scattered(made, 0.4)
    experts = [[made.lora_A[str(e)].weight, made.lora_B[str(e)].weight] for e in range(EXPERTS)]
    return Gated(made, (rows(2, 5, WIDTH),), [Layer("gate.weight", made, experts, TOP_K)])


# --- with a capacity --------------------------------------------------------------------------------------------------


@model("st-moe-pytorch", "MoE, top-2", refused="capacity", why=CAPACITY)
def st_moe() -> Gated:
    from st_moe_pytorch import MoE

    made = scattered(MoE(dim=WIDTH, num_experts=EXPERTS, gating_top_n=2))
    layers = [Layer("gate.to_gates.weight", made, listed(made.experts.experts), 2)]
    return Gated(made, (rows(2, 8, WIDTH),), layers)


@model("fairscale", "MOELayer with a Top2Gate", refused="capacity", why=CAPACITY)
def fairscale() -> Gated:
    from fairscale.nn.moe import MOELayer, Top2Gate

    one_process()
    experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
    made = scattered(MOELayer(Top2Gate(WIDTH, EXPERTS), experts))
    return Gated(made, (rows(8, 2, WIDTH),), [Layer("gate.wg.weight", made, listed(experts), 2)])


@model("mixture-of-experts", "MoE", refused="capacity", why=CAPACITY)
def mixture_of_experts() -> Gated:
    from mixture_of_experts import MoE

    made = scattered(MoE(dim=WIDTH, num_experts=EXPERTS))
    return Gated(made, (rows(2, 8, WIDTH),), [Layer("gate.w_gating", made, stacked(*made.experts.parameters()), 2)])
