"""These tests run in vLLM's own environment, `.ci/vllm`. Without vLLM none of their files is imported."""

import importlib.util
import os

import pytest

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("vllm") is None else []

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@pytest.fixture
def vllm_config():
    """Of an engine, in force."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(config := VllmConfig()):
        yield config
