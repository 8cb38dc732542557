"""`sere explain`, on checkpoints as `save_pretrained` writes them."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sere_compile.cli import main
from sere_compile.integrations.transformers import load_causal_lm

from ..tiny_models import VOCABULARY, build, gate_names, mixtral


def save(folder, model):
    """A checkpoint with a tokenizer of a few whole words."""
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "The", "capital", "of", "France", "is"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mixtral"), mixtral())


def save_dense(folder):
    """A checkpoint without any gate."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return save(folder, LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense"))


def explain(*arguments):
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def test_explain_prints_the_table_of_gates(moe):
    """A line for each gate with its E, K and S."""
    result = explain("--model", moe, "--select-top-k", "1")
    assert result.exit_code == 0, result.output
    assert "2 MoE gates found, 2 rewritten" in result.output
    lines = result.output.splitlines()
    for gate in gate_names():
        (line,) = [line for line in lines if line.startswith(gate)]
        assert line.split()[1:4] == ["8", "2", "1"]


def test_a_bad_option_is_an_error_before_anything_is_loaded():
    """Our message, not a traceback."""
    result = explain("--model", "no/such/model", "--select-top-k", "0")
    assert result.exit_code == 1
    assert "Error: select_top_k must be None or an integer of at least 1, got 0" in result.output


def test_a_model_without_gates_exits_with_one(dense):
    """Scripts can tell."""
    result = explain("--model", dense)
    assert result.exit_code == 1
    assert "0 MoE gates found" in result.output


def test_a_text_without_tokens_is_refused(moe, tmp_path):
    """For a folder without a tokenizer transformers makes an empty one."""
    folder = tmp_path / "model"
    build("qwen3_moe").save_pretrained(folder)
    result = explain("--model", folder)
    assert result.exit_code == 1
    assert f"the tokenizer of {str(folder)!r} makes no tokens of the text; are its files" in result.output
    result = explain("--model", moe, "--prompt", "")
    assert result.exit_code == 2
    assert "--prompt is empty" in result.output


def test_a_damaged_checkpoint_is_one_line(moe, tmp_path):
    folder = shutil.copytree(moe, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    result = explain("--model", folder)
    assert result.exit_code == 1
    assert f"Error: no tokenizer could be loaded from {str(folder)!r}: KeyError: 'added_tokens'" in result.output


def test_without_transformers_the_error_names_the_extra(moe, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = explain("--model", moe)
    assert result.exit_code == 1
    assert "pip install 'sere-compile[hf]'" in result.output


def test_strict_exits_with_one_where_a_gate_is_left_alone(moe, monkeypatch):
    """Only then: two layers that share a router cannot be told apart."""

    def with_one_router(*arguments, **options):
        model, tokenizer = load_causal_lm(*arguments, **options)
        first, second = (layer.mlp.gate for layer in model.model.layers)
        second.weight = first.weight
        return model, tokenizer

    assert explain("--model", moe, "--strict").exit_code == 0
    torch._dynamo.reset()  # it does not look whether parameters are one and the same
    monkeypatch.setattr("sere_compile.commands.explain.load_causal_lm", with_one_router)
    codes = {options: explain("--model", moe, *options).exit_code for options in ((), ("--strict",))}
    assert codes == {(): 0, ("--strict",): 1}
