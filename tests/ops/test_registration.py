"""What registering the operators does to torch and to the process, and that the kernels compile for a GPU.

Everything that needs real Triton runs in a process of its own, because without CUDA this one interprets.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._library.triton import get_triton_kernels_for_op

from sere_compile.ops import reroute
from sere_compile.ops.registration import FINGERPRINT

# Finds sere_compile.ops without running sere_compile/__init__.py, which imports much more.
ONLY_OPS = f"""
    import sys, types
    import torch
    sys.modules["sere_compile"] = types.ModuleType("sere_compile")
    sys.modules["sere_compile"].__path__ = []
    import importlib.util
    path = {os.path.dirname(sys.modules["sere_compile.ops"].__file__)!r}
    spec = importlib.util.spec_from_file_location(
        "sere_compile.ops", path + "/__init__.py", submodule_search_locations=[path]
    )
    ops = importlib.util.module_from_spec(spec)
    sys.modules["sere_compile.ops"] = ops
    spec.loader.exec_module(ops)
"""


def run_alone(code, **environment):
    """Run `code` in a fresh process without the interpreter's variable; its output."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    code = textwrap.dedent(ONLY_OPS) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_triton_alone():
    """Importing the operators imports no Triton (triton_op's own scan would), a CPU call no kernel."""
    run_alone("""
        assert "triton" not in sys.modules
        ids, similarity = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(8, 8)
        ops.reroute(ids, similarity, 2)
        ops.reroute_merged(ids, torch.zeros(3, 4), similarity, 2)
        assert not [m for m in sys.modules if m.startswith("sere_compile") and m.endswith(".kernel")]
    """)


@pytest.mark.parametrize("name", ["sere::expert_mlp", "sere::reroute", "sere::reroute_merged"])
def test_cache_key_covers_the_source(name):
    """AOTAutograd keys its cache with the source of everything an operator decomposes to."""
    assert get_triton_kernels_for_op(name) == [FINGERPRINT]


@pytest.mark.slow
def test_changed_source_is_not_served_from_the_cache(monkeypatch):
    """Compiled code of an older version of this package is not used again."""
    ids, similarity = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(8, 8)

    def compile_again():
        torch._dynamo.reset()
        counters.clear()
        torch.compile(lambda i, s: reroute(i, s, 4), fullgraph=True)(ids, similarity)
        return counters["aot_autograd"]["autograd_cache_hit"]

    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        assert compile_again() == 0
        assert compile_again() == 1
        monkeypatch.setitem(FINGERPRINT.__dict__, "src", "# another version")
        assert compile_again() == 0
    torch._dynamo.reset()


@pytest.mark.slow
def test_tracing_for_cuda_reaches_the_kernels():
    """make_fx with symbolic T on fake CUDA tensors sees the kernel launches, one or two by size."""
    run_alone("""
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional as functional
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation as mutation
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
        from sere_compile.ops.reroute.kernel import launch_reroute
        from sere_compile.ops.reroute_merged.kernel import launch_reroute_merged

        def launches(function, num_tokens):
            mode = FakeTensorMode(shape_env=ShapeEnv())
            dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
            rows = mode.from_tensor(torch.empty(num_tokens, 8), symbolic_context=dynamic).shape
            with mode:
                ids = torch.empty(rows, dtype=torch.int64, device="cuda")
                weights = torch.empty(rows, dtype=torch.bfloat16, device="cuda")
                similarity = torch.empty(128, 128, device="cuda")
            nodes = make_fx(function, tracing_mode="symbolic")(ids, weights, similarity).graph.nodes
            assert isinstance(ids.shape[0], torch.SymInt)
            return sum(n.target in (functional, mutation) for n in nodes)

        def single(ids, weights, similarity):
            return launch_reroute(ids, similarity, 2, 0.3, 8, None)

        def merged(ids, weights, similarity):
            return launch_reroute_merged(ids, weights, similarity, 2, 0.3, 0, None)

        assert [launches(single, n) for n in (32, 1024, 1025)] == [1, 1, 2]
        assert launches(merged, 32) == 2
    """)


@pytest.mark.slow
def test_tracing_route_for_cuda_reaches_the_kernels():
    """With symbolic T: re-routing is part of one launch where that is faster."""
    run_alone("""
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional as functional
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation as mutation
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
        from sere_compile.ops.route.launch import launch_route
        from sere_compile.ops.route.reference import Rerouting, Scoring

        def launches(num_tokens, budget=0, experts=8):
            mode = FakeTensorMode(shape_env=ShapeEnv())
            dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
            rows = mode.from_tensor(torch.empty(num_tokens, experts), symbolic_context=dynamic).shape
            with mode:
                logits = torch.empty(rows, dtype=torch.bfloat16, device="cuda")
                similarity = torch.empty(experts, experts, device="cuda")

            def call(logits, similarity):
                return launch_route(logits, None, Scoring(2, "softmax"), Rerouting(similarity, 1, 0.0, 2, budget))

            graph = make_fx(call, tracing_mode="symbolic")
            nodes = [n for n in graph(logits, similarity).graph.nodes if n.target in (functional, mutation)]
            assert isinstance(logits.shape[0], torch.SymInt)
            return len(nodes)

        counts = [launches(2), launches(64), launches(65), launches(32, 4), launches(32, experts=128)]
        assert counts == [1, 1, 2, 2, 2], counts
    """)


@pytest.mark.slow
def test_kernels_compile_for_sm90(tmp_path):
    """Every kernel compiles to machine code for Hopper with both id types; no GPU is needed for that."""
    output = run_alone(
        """
        import os
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from sere_compile.ops.reroute.kernel import (
            apply_map_kernel, expert_block, expert_map_kernel, launch_config, reroute_kernel,
        )
        from sere_compile.ops.fill.kernel import fill_kernel
        from sere_compile.ops.fill.launch import ROWS, default_tile
        from sere_compile.ops.fill.reference import CLOSED, RESTORE, WORTH
        from sere_compile.ops.fill.statistics import statistics_kernel
        from sere_compile.ops.repeats.kernel import merge_repeats_kernel
        from sere_compile.ops.reroute_merged.kernel import merge_launch_config, merge_slots_kernel
        from sere_compile.ops.route.kernel import route_kernel, route_reroute_kernel
        from sere_compile.ops.route.launch import tile_for

        if not os.path.exists(triton.knobs.nvidia.ptxas.path):
            print("no ptxas"); sys.exit()
        SCALARS = dict(threshold="fp32", num_tokens="i32", num_slots="i32", min_active="i32", max_active="i32",
                       stride_k="i32", epsilon="fp32", scale="fp32",
                       tokens_a_row="i32", least="i32", budget="i32", score_stride_t="i32",
                       choice_stride_t="i32", stride_t="i32", stride_m="i32",
                       weight_stride_t="i32", weight_stride_k="i32")

        def compile_for_sm90(kernel, num_warps, constants, **pointers):
            types = {**SCALARS, **pointers}
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            constants = {name: constants[name] for name, type in signature.items() if type == "constexpr"}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            options = dict(num_warps=num_warps)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert len(compiled.asm["cubin"]) > 1000

        for ids, flags in (("*i32", True), ("*i64", False)):
            for experts, num_tokens in ((128, 32), (60, 1000), (128, 5000)):
                config = launch_config(num_tokens, expert_block(experts))
                constants = dict(K=8, SELECT=2, E=experts, E_BLOCK=expert_block(experts), HAS_MASK=flags,
                                 HAS_REAL=flags, HAS_MIN=flags, HAS_MAX=flags, SLOTS=config.slots,
                                 CHUNK=config.chunk, BLOCK=1024)
                kernel = reroute_kernel if num_tokens <= 1024 else expert_map_kernel
                compile_for_sm90(kernel, config.num_warps, constants, ids_ptr=ids, sim_ptr="*bf16",
                                 mask_ptr="*i1", real_ptr="*i64", out_ptr=ids, map_ptr="*i32")
            compile_for_sm90(apply_map_kernel, 4, constants, ids_ptr=ids, map_ptr="*i32", real_ptr="*i64", out_ptr=ids)
            config = merge_launch_config(128)
            constants.update(TOKENS=config.slots, CHUNK=config.chunk)
            compile_for_sm90(merge_slots_kernel, config.num_warps, constants, ids_ptr=ids, weights_ptr="*bf16",
                             map_ptr="*i32", mask_ptr="*i1", out_ids_ptr=ids, out_weights_ptr="*bf16")
            compile_for_sm90(merge_repeats_kernel, 4, dict(K=6, SLOTS=8, TOKENS=16), ids_ptr=ids, out_ids_ptr=ids,
                             weights_ptr="*fp32", out_weights_ptr="*fp32")
            for experts in (128, 60, 512):
                e_block = triton.next_power_of_2(experts)
                tile = default_tile(e_block)
                constants = dict(K=8, K_BLOCK=8, SELECT=2, E=experts, E_BLOCK=e_block, SCORING="scores", GROUPS=1,
                                 HAS_CHOICE=flags, HAS_BIAS=False, TOP_GROUPS=1, TOP2=False, G_BLOCK=1, HAS_MAX=flags,
                                 HAS_THRESHOLD=flags, ROWS=ROWS, STEP=max(1, min(ROWS, 2048 // e_block)), WORTH=WORTH,
                                 RESTORE=RESTORE, CLOSED=CLOSED, TOKENS=tile.tokens, HAS_MASK=flags)
                rows = dict(mass_ptr="*fp32", slots_ptr="*i32", ids_ptr=ids, weights_ptr="*bf16")
                compile_for_sm90(statistics_kernel, 4, constants, mask_ptr="*i1", **rows)
                compile_for_sm90(fill_kernel, tile.num_warps, constants, scores_ptr="*fp32", choice_ptr="*fp32",
                                 bias_ptr="*fp32", out_ids_ptr=ids, out_weights_ptr="*bf16", **rows)
        for scoring, groups in (("softmax", 1), ("sigmoid", 4), ("softmax_after", 1)):
            narrow = scoring == "softmax"
            constants = dict(K=6, K_BLOCK=8, E=60, E_BLOCK=64, SCORING=scoring, RENORMALIZE=True, TOKENS=1,
                             HAS_BIAS=scoring == "sigmoid", GROUPS=groups, TOP_GROUPS=(groups + 1) // 2, TOP2=True,
                             OUTSIDE_ZERO=False, G_BLOCK=groups, NARROW=narrow, SELECT=2, HAS_MIN=narrow,
                             HAS_MAX=not narrow, HAS_PROJECTION=narrow, HAS_STATISTICS=not narrow,
                             HAS_REAL=narrow)
            pointers = dict(logits_ptr="*bf16", bias_ptr="*fp32", weights_ptr="*bf16", ids_ptr="*i64", real_ptr="*i64",
                            sim_ptr="*fp32", projection_ptr="*fp32", mass_ptr="*fp32", slots_ptr="*i32")
            compile_for_sm90(route_kernel, 1, constants, **pointers)
            tile = tile_for(32, 64, narrow)
            constants.update(TOKENS=tile.tokens, ROWS=tile.rows(64), CHUNK=tile.chunk)
            compile_for_sm90(route_reroute_kernel, tile.num_warps, constants, **pointers)
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    if "no ptxas" in output:
        pytest.skip("Triton has no ptxas here")


@pytest.mark.slow
def test_tracing_expert_mlp_for_cuda_reaches_the_kernels():
    """With symbolic T: first and second projection are two launches, and no guard on a size class is broken."""
    run_alone("""
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional as functional
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation as mutation
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
        from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp

        for num_tokens in (4, 32, 256):
            mode = FakeTensorMode(shape_env=ShapeEnv())
            dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
            rows = mode.from_tensor(torch.empty(num_tokens, 8), symbolic_context=dynamic).shape
            with mode:
                ids = torch.empty(rows, dtype=torch.int64, device="cuda")
                weights = torch.empty(rows, dtype=torch.bfloat16, device="cuda")
                hidden = torch.empty(rows[0], 128, dtype=torch.bfloat16, device="cuda")
                gate_up = torch.empty(16, 128, 128, dtype=torch.bfloat16, device="cuda")
                down = torch.empty(16, 128, 64, dtype=torch.bfloat16, device="cuda")

            def call(*args):
                return launch_expert_mlp(*args, None, None, "silu_glu", False, False)

            nodes = make_fx(call, tracing_mode="symbolic")(hidden, ids, weights, gate_up, down).graph.nodes
            assert isinstance(ids.shape[0], torch.SymInt)
            assert sum(n.target in (functional, mutation) for n in nodes) == 2
    """)


def test_only_results_are_written_to(tmp_path):
    """torch reads from a kernel's code what it writes. Whatever else it took for written would be copied each call."""
    run_alone(
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional as functional
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp
        from sere_compile.ops.reroute.kernel import launch_reroute
        from sere_compile.ops.route.launch import launch_route
        from sere_compile.ops.route.reference import Rerouting, Scoring

        class Hopper:
            def get_current_target(self):
                return GPUTarget("cuda", 90, 32)

        triton.runtime.driver.set_active(Hopper())
        with FakeTensorMode():
            def drawn(*shape, dtype=torch.bfloat16):
                return torch.empty(shape, dtype=dtype, device="cuda")

            ids, logits = drawn(32, 8, dtype=torch.int64), drawn(32, 8)
            gate_up, down = drawn(16, 96, 64), drawn(16, 64, 48)
            few, many = ((drawn(n, 64), drawn(n, 8, dtype=torch.int64), drawn(n, 8)) for n in (32, 128))
            similarity, small = (torch.empty(n, n, device="cuda") for n in (16, 8))

        def written(call, *tensors):
            graph = make_fx(torch.func.functionalize(call), tracing_mode="fake")(*tensors).graph
            return [set(n.kwargs["tensors_to_clone"]) for n in graph.nodes if n.target is functional]

        def experts(*tensors):
            return launch_expert_mlp(*tensors, None, None, "silu_glu", False, False)

        plan = {"order_ptr", "active_ptr", "first_ptr"}
        assert written(experts, *few, gate_up, down) == [{"act_ptr", *plan}, {"out_ptr"}]
        found = written(experts, *many, gate_up, down)
        assert found == [plan, {"act_ptr"}, {"out_ptr"}], found
        assert written(lambda i, s: launch_reroute(i, s, 2, 0.3, 8, None), ids, similarity) == [{"out_ptr"}]
        for rerouting in (lambda s: Rerouting(), lambda s: Rerouting(s, 1, 0.0, 2)):
            call = lambda x, s: launch_route(x, None, Scoring(2, "softmax"), rerouting(s))
            assert written(call, logits, small) == [{"weights_ptr", "ids_ptr"}]
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), [(90, 227), (89, 99)])
def test_expert_mlp_kernels_compile(capability, shared, tmp_path):
    """For Hopper and for a GPU with less shared memory: tiles fit it and are copied to it 16 bytes at a time."""
    output = run_alone(
        """
        import itertools
        import os
        import re
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from sere_compile.ops.expert_mlp.kernel import chunk_of, down_kernel, gate_up_kernel, plan_kernel
        from sere_compile.ops.expert_mlp.tiles import FEW_TILES, launch_config

        capability, shared = int(os.environ["CAPABILITY"]), int(os.environ["SHARED"])

        if not os.path.exists(triton.knobs.nvidia.ptxas.path):
            print("no ptxas"); sys.exit()

        def compile_alone(kernel, element, ones, constants, **pointers):
            pointers |= dict(order_ptr="*i32", active_ptr="*i32", first_ptr="*i32")
            pointers = dict(s_ptr="*fp32") | pointers | dict(out_ptr="*fp32", ids_ptr="*i64")
            scalars = dict.fromkeys(("num_slots", "stride_e", "stride_n", "stride_d", "stride_t", "stride_k"), "i32")
            types = {n: pointers.get(n, f"*{element}") for n in kernel.arg_names if n.endswith("_ptr")}
            types |= {n: type for n, type in scalars.items() if n not in ones}
            constants = {**constants, **dict.fromkeys(ones, 1)}
            options = {n: constants[n] for n in ("num_warps", "num_stages") if n in constants}
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n in types}
            constants = {name: constants[name] for name, type in signature.items() if type == "constexpr"}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
            return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

        LAYERS = [
            ("bf16", torch.bfloat16, False, dict(K=8, E=128, HIDDEN=2048, INNER=768), ("silu", True, False, False), 0),
            ("bf16", torch.bfloat16, False, dict(K=2, E=8, HIDDEN=4096, INNER=14336), ("silu", True, False, False), 0),
            ("bf16", torch.bfloat16, True, dict(K=4, E=32, HIDDEN=2880, INNER=2880), ("gpt_oss", True, True, True), 0),
            ("bf16", torch.bfloat16, False, dict(K=4, E=32, HIDDEN=2880, INNER=2880), ("gpt_oss", *[True] * 3), 32),
            ("bf16", torch.bfloat16, False, dict(K=8, E=128, HIDDEN=2048, INNER=768), ("silu", True, False, False), 32),
            ("fp32", torch.float32, False, dict(K=2, E=8, HIDDEN=100, INNER=200), ("relu2", False, False, True), 0),
        ]
        for (element, dtype, transposed, shape, flags, scale), slots in itertools.product(LAYERS, (128, 4096)):
            shape |= dict(zip(("ACTIVATION", "GATED", "INTERLEAVED", "HAS_BIAS"), flags, strict=True))
            many, few = slots > 24 * shape["E"], shape["E"] * shape["HIDDEN"] < 64 * FEW_TILES
            config = launch_config(dtype, transposed, many, slots >= 1024, scale == 32, few)
            shape |= {"SCALE": scale, "ALIGN": config.gate_up.step, "PLANNED": config.planned}
            shape |= chunk_of(slots, shape["E"], config.chunk)
            ones = ("stride_k", "stride_n" if transposed else "stride_d")
            packed = {"w_ptr": "*u8", "s_ptr": "*u8"} if scale == 32 else {}
            for kernel, tile in ((gate_up_kernel, config.gate_up), (down_kernel, config.down)):
                compiled = compile_alone(kernel, element, ones, {**shape, **tile.arguments()}, **packed)
                assert compiled.metadata.shared <= shared * 1024
                assert element == "fp32" or "cp.async.cg.shared.global" in compiled.asm["ptx"]
                if element == "bf16" and not transposed and not scale and slots == 128:
                    compile_alone(kernel, element, ones, {**shape, **tile.arguments(), "SCALE": 128}, w_ptr="*fp8e4nv")
            if config.planned:
                compile_alone(plan_kernel, element, ("stride_k",), {**shape, "num_warps": 4})
        """,
        TRITON_CACHE_DIR=str(tmp_path),
        CAPABILITY=str(capability),
        SHARED=str(shared),
    )
    if "no ptxas" in output:
        pytest.skip("Triton has no ptxas here")
