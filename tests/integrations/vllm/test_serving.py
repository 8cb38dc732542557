"""What surrounds the router: configuration errors, batches that change, processes, HTTP."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere_compile import ConfigError, GateNotFoundError, ProfileError, SereError, SimilarityProfile
from sere_compile.integrations.vllm import EngineMismatchError, plugin, stats
from sere_compile.integrations.vllm import engine as internals

from . import models
from .engine import ATTENTION, engine, generate, hooks

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


def profile_file(folder, experts=16, layers=2):
    matrix = torch.rand(experts, experts, generator=torch.Generator().manual_seed(0))
    matrix = ((matrix + matrix.T) / 2).fill_diagonal_(1.0)
    path = folder / "profile.safetensors"
    SimilarityProfile({f"model.layers.{i}.mlp.gate.weight": matrix for i in range(layers)}).save(path)
    return str(path)


def test_an_unknown_option_is_an_error_at_the_start(folder):
    with (
        pytest.raises(Exception, match="unknown option 'select_topk' of sere; did you mean 'select_top_k'"),
        engine(folder, {"select_topk": 2}),
    ):
        pass


@pytest.mark.parametrize(("experts", "layers", "message"), [
    (8, 2, "does not fit model.layers.0.mlp.experts, which has 16 experts"),
    (16, 1, "no matrices for vLLM's MoE layer model.layers.1.mlp.experts"),
    (16, 3, "gates that this model does not have: model.layers.2.mlp.gate.weight"),
])  # fmt: skip
def test_a_wrong_profile_is_an_error_at_the_start(folder, tmp_path, experts, layers, message):
    with (
        pytest.raises(ProfileError, match=message),
        engine(folder, {"profile": profile_file(tmp_path, experts, layers)}),
    ):
        pass


def test_batch_invariance_is_refused(folder, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(Exception, match="VLLM_BATCH_INVARIANT promises"), engine(folder, {}):
        pass


def test_ranks_that_come_and_go_are_refused(folder):
    config = SimpleNamespace(parallel_config=SimpleNamespace(enable_elastic_ep=True))
    with pytest.raises(ConfigError, match="elastic expert parallelism"):
        internals.check_modes(config)


def test_weights_that_are_loaded_anew(folder):
    """By vLLM's own reload, layers are re-routed as before. Where weights are kept it is refused, and nothing is lost.

    On a CPU vLLM 0.32 itself gives other tokens after it: its rotary embedding has no weights, and loses a buffer.
    """
    prompts = [[5, 9, 2], [7, 1], [3, 3, 8, 4], [11, 6]]
    with engine(folder, {"select_top_k": 1, "min_active": 0, "collect_stats": True}) as llm:
        generate(llm, prompts)
        once = {name: gate.calls for name, gate in stats(llm).items()}
        llm.collective_rpc("reload_weights")
        tokens = generate(llm, prompts)
        assert {name: gate.calls for name, gate in stats(llm).items()} == {name: 2 * n for name, n in once.items()}
        hooks(llm).cannot_reload = "kept"
        with pytest.raises(Exception, match="weights cannot be loaded anew: kept"):
            llm.collective_rpc("reload_weights")
        assert generate(llm, prompts) == tokens


def test_a_changed_internal_is_one_error_at_the_start(folder, monkeypatch):
    changed = ("vllm.forward_context", "create_forward_context", ("attn_metadata", "renamed"))
    monkeypatch.setattr(internals, "INTERNALS", (*internals.INTERNALS, changed, ("vllm.forward_context", "gone", ())))
    with (
        pytest.raises(EngineMismatchError, match=r"has no parameter renamed; vllm.forward_context has no gone\. "),
        engine(folder, {}),
    ):
        pass


def test_a_kernel_that_routes_by_itself_is_refused_with_backends_that_do_not(folder, monkeypatch):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    monkeypatch.setattr(MoERunner, "is_monolithic", property(lambda self: True))
    message = r"CPU\w*Experts\) routes by itself and never asks vLLM's router; .* --moe-backend triton, or marlin"
    with pytest.raises(EngineMismatchError, match=message), engine(folder, {"select_top_k": 1}):
        pass


def test_the_reference_switch_is_honoured_and_batches_grow_and_shrink(folder):
    """`hf_overrides` alone; requests leave at different times; a batch of one is never changed."""
    lengths = [2, 3, 5, 8, 8, 12]
    with engine(folder) as llm:
        alone = generate(llm, models.prompts(1), 6)
    with engine(folder, hf_overrides={"select_top_k": 1, "threshold": 0.1}, max_num_seqs=4) as llm:
        outputs = generate(llm, models.prompts(6), lengths)
        state = hooks(llm).state
        assert 0 < state.active_forwards < state.forwards
        assert generate(llm, models.prompts(1), 6) == alone
        hook = next(iter(hooks(llm).hooks.values()))
        assert hook.options[:2] == (1, 0.1)
    assert [len(o) for o in outputs] == lengths


def test_weights_that_vllm_makes_up(folder):
    """`load_format="dummy"`, as one tries out a deployment: nothing is read but the configuration, probing works."""
    with engine(folder, {"select_top_k": 1, "collect_stats": True}, load_format="dummy") as llm:
        outputs = generate(llm, models.prompts(8), 6)
        assert all(hook.has_run for hook in hooks(llm).hooks.values())
        assert all(gate.calls == 5 for gate in stats(llm).values())
    assert [len(tokens) for tokens in outputs] == [6] * 8


def test_every_batch_with_phase_all(folder, monkeypatch, caplog):
    """And a line of statistics in the log."""
    monkeypatch.setattr(plugin, "LOG_SECONDS", 0.0)
    with engine(folder, {"select_top_k": 1, "phase": "all", "collect_stats": True}) as llm:
        # What ran while the worker warmed up is not counted.
        assert hooks(llm).state.forwards == 0
        assert {gate.calls for gate in stats(llm).values()} == {0}
        # vLLM sets up its loggers anew when an engine is made.
        monkeypatch.setattr(plugin.log, "handlers", [caplog.handler])
        with caplog.at_level(logging.INFO, plugin.log.name):
            generate(llm, models.prompts(4), 3)
        assert hooks(llm).state.active_forwards == hooks(llm).state.forwards == 3
        assert {gate.calls for gate in stats(llm).values()} == {3}
    lines = [record.getMessage() for record in caplog.records if "active experts" in record.getMessage()]
    assert re.fullmatch(
        r"SERE: active experts [\d.]+ -> [\d.]+ per layer and re-routed batch, 3 of 3 batches re-routed", lines[-1]
    )


def test_a_checkpoint_that_the_reference_calibrated_brings_its_matrices(folder, tmp_path):
    """They stand among the weights, where vLLM's own loader stumbles over them."""
    calibrated = shutil.copytree(folder, tmp_path / "calibrated")
    weights = load_file(calibrated / "model.safetensors")
    matrices = [torch.rand(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    matrices = [((m + m.T) / 2).fill_diagonal_(1.0) for m in matrices]
    weights |= {f"model.layers.{i}.mlp.similarity_matrix": m for i, m in enumerate(matrices)}
    save_file(weights, calibrated / "model.safetensors", metadata={"format": "pt"})
    with engine(calibrated, {"select_top_k": 1}) as llm:
        used = [hook.matrix for hook in hooks(llm).hooks.values()]
    assert all(torch.equal(*pair) for pair in zip(used, matrices, strict=True))


def with_a_draft_layer(folder, to):
    """DeepSeek-V3 with a third layer for multi-token prediction, a copy of the second."""
    model = models.save("deepseek_v3", to)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    weights = load_file(model / "model.safetensors")
    for name in [n for n in weights if n.startswith("model.layers.1.")]:
        weights[name.replace("layers.1.", "layers.2.")] = weights[name].clone()
    size = config["hidden_size"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"model.layers.2.{name}.weight"] = torch.ones(size)
    weights["model.layers.2.eh_proj.weight"] = torch.eye(size).repeat(1, 2)
    weights["model.layers.2.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.2.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_draft_model_is_left_alone_and_its_tokens_count_as_decoding(tmp_path):
    """A profile of the two layers that transformers knows fits; batches with proposed tokens are re-routed."""
    model = with_a_draft_layer(tmp_path, tmp_path / "model")
    sere = {"select_top_k": 1, "profile": profile_file(tmp_path), "collect_stats": True}
    draft = {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": ATTENTION}
    with engine(model, sere, speculative_config=draft) as llm:
        generate(llm, models.prompts(4))
        state, counted = hooks(llm).state, stats(llm)
        assert list(counted) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    # All forwards but that of the prompts; those of the draft model are not among them.
    assert 0 < state.active_forwards == state.forwards - 1 < 8
    assert all(gate.slots_changed > 0 for gate in counted.values())
    assert all(gate.calls == state.active_forwards for gate in counted.values())


def test_no_statistics_is_an_error(folder):
    with engine(folder, {"select_top_k": 1}) as llm, pytest.raises(SereError, match="collect_stats"):
        stats(llm)


def test_a_hook_that_never_runs_is_reported(folder, monkeypatch, caplog):
    """As when somebody replaced the router after the hook was installed."""
    monkeypatch.setattr("sere_compile.integrations.vllm.routing.RoutingHook.install", lambda self: None)
    with caplog.at_level(logging.WARNING, "vllm.sere_compile"):
        logging.getLogger("vllm").propagate = True
        with engine(folder, {"select_top_k": 1}) as llm:
            generate(llm, models.prompts(2), plugin.FORWARDS_BEFORE_WARNING + 2)
    assert "2 of 2 hooks never ran, first model.layers.0.mlp.experts" in caplog.text


def test_a_hook_that_never_runs_is_an_error_with_strict(folder, monkeypatch):
    monkeypatch.setattr("sere_compile.integrations.vllm.routing.RoutingHook.install", lambda self: None)
    with (
        engine(folder, {"select_top_k": 1, "strict": True}) as llm,
        pytest.raises(GateNotFoundError, match="2 of 2 hooks never ran"),
    ):
        generate(llm, models.prompts(2), plugin.FORWARDS_BEFORE_WARNING + 2)


def test_a_compiled_engine_says_the_same(folder):
    """Dynamo traces the hook on a CPU: nothing about the batch may be baked in."""
    sere = {"select_top_k": 1, "min_active": 0}
    with engine(folder, sere) as llm:
        eager = [generate(llm, models.prompts(n), 6) for n in (8, 3)]
    with engine(folder, sere, enforce_eager=False) as llm:
        compiled = [generate(llm, models.prompts(n), 6) for n in (8, 3)]
        assert all(int(hook.traced_calls) > 0 for hook in hooks(llm).hooks.values())
    assert compiled == eager


PARALLEL = """
import json, sys
from tests.integrations.vllm import models
from tests.integrations.vllm.engine import engine, generate
if __name__ == "__main__":
    sere = {"select_top_k": 1, "min_active": 0}
    from pathlib import Path
    with engine(Path(sys.argv[1]), sere, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        tokens = generate(llm, models.prompts(8), 6)
        matrices = llm.collective_rpc("sere_digest")
    print("RESULT" + json.dumps([tokens, matrices]))
"""


def test_two_tensor_parallel_ranks_agree(folder):
    """Probed on each rank from half of every expert, the matrices are the same, and so are the tokens of one rank."""
    with engine(folder, {"select_top_k": 1, "min_active": 0}) as llm:
        alone = generate(llm, models.prompts(8), 6)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PARALLEL, str(folder)],
        cwd=root, capture_output=True, text=True, timeout=480, check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tokens, digests = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    assert digests[0] == digests[1]
    assert tokens == alone


def test_the_server_answers_http(tmp_path):
    """`vllm serve` on a trained model, with the one line on its command line and the engine in a process of its own."""
    model = models.SHIPPED / "qwen3"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    sere = json.dumps({"sere": {"select_top_k": 1}})
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--additional-config", sere]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "64", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        answer = _post_when_ready(server, port, {
            "model": str(model), "prompt": models.texts(model)[0], "max_tokens": 6, "temperature": 0,
            "ignore_eos": True,
        })  # fmt: skip
    finally:
        server.terminate()
        server.wait(30)
    text = log.read_text()
    assert answer is not None, text[-4000:]
    assert len(answer["choices"]) == 8
    assert all(choice["text"].strip() for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 48
    assert "SERE re-routes 4 of 4 MoE layers" in text


def test_the_example():
    """On the trained model, as its user runs it: it checks itself.

    In bfloat16, so that on a CPU with AMX the probed experts are the process's first use of it.
    """
    example = Path(__file__).parents[3] / "examples" / "vllm_serve.py"
    done = subprocess.run(
        [sys.executable, example, "--batch", "8", "--tokens", "8", "--eager"],
        capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("active experts") == 4


def _post_when_ready(server, port, body, seconds=360):
    for _ in range(seconds):
        time.sleep(1)
        if server.poll() is not None:
            return None
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            continue
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
