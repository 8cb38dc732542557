"""One small engine at a time, in this process."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from pathlib import Path

from vllm import LLM, SamplingParams

TOKENS = 8
# Of latent attention, for float32: on a CPU with AMX vLLM takes one that cannot hold it. Other models ask for none.
ATTENTION = "CPU_MLA"


@contextmanager
def engine(folder: Path, sere: dict | None = None, **options):
    """An eager float32 engine on a saved model; `sere` goes into additional_config."""
    additional = {"additional_config": {"sere": sere}} if sere is not None else {}
    small = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 16}
    exact = {"dtype": "float32", "attention_backend": ATTENTION}
    settings = {**small, **exact, "skip_tokenizer_init": True, **additional, **options}
    llm = LLM(model=str(folder), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(llm: LLM, prompts: list[list[int]], tokens: int | list[int] = TOKENS) -> list[list[int]]:
    """Greedy continuations, as token ids; `tokens` for all, or for each."""
    lengths = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
    params = [SamplingParams(max_tokens=n, temperature=0, detokenize=False, ignore_eos=True) for n in lengths]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def hooks(llm: LLM):
    """The `WorkerHooks` of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.sere
