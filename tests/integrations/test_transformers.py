"""Checkpoints that cannot be loaded, and what differs between versions of transformers."""

import json
import os
import re
import shutil

import pytest
from click.testing import CliRunner

from sere_compile import ModelNotFoundError
from sere_compile.cli import main
from sere_compile.integrations import transformers
from sere_compile.integrations.transformers import SHIPPED, cache_argument, load_causal_lm

from ..tiny_models import mixtral


class Older:
    def forward(self, input_ids=None, past_key_values=None): ...


class Newer:
    def forward(self, input_ids=None, cache=None): ...


def test_name_of_the_cache():
    assert cache_argument(Older()) == "past_key_values"
    assert cache_argument(Newer()) == "cache"
    assert cache_argument(mixtral()) in ("cache", "past_key_values")


def rewrite(name, **changes):
    """What changes some entries of a checkpoint's JSON file."""

    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "what", "told"),
    [
        (write("config.json", "{}"), "causal language model", "ValueError: Unrecognized model"),
        (rewrite("config.json", model_type="foo_moe"), "causal language model", "ValueError: .*model type `foo_moe`"),
        (rewrite("config.json", hidden_size=96), "causal language model", "RuntimeError: .*mismatch"),
        (write("config.json", "[]"), "tokenizer", "TypeError: "),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "causal language model", "SafetensorError: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "causal language model", "OSError: .*no file named"),
        (write("tokenizer.json", "{}"), "tokenizer", "KeyError: 'added_tokens'"),
        (write("tokenizer.json", "{ not"), "tokenizer", "JSONDecodeError: "),
        (rewrite("tokenizer.json", model={"type": "Foo"}), "tokenizer", "Exception: data did not match"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_of_ours(tmp_path, damage, what, told):
    """It names the folder and what could not be loaded from it, and keeps the original."""
    folder = shutil.copytree(SHIPPED / "mixtral", tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelNotFoundError, match=rf"(?s)^no {what} could be loaded from '{folder}': {told}") as caught:
        load_causal_lm(str(folder))
    assert type(caught.value.__cause__).__name__ == told.partition(":")[0]


@pytest.mark.parametrize("load", [load_causal_lm, lambda kind: CliRunner().invoke(main, ["demo", "--model", kind])])
def test_a_model_that_only_a_clone_has(tmp_path, monkeypatch, load):
    """A wheel holds one; asked for another, by name, the error says where it is."""
    shutil.copytree(SHIPPED / "qwen3", tmp_path / "qwen3")
    monkeypatch.setattr(transformers, "SHIPPED", tmp_path)
    told = r"'upcycled' is not in the installed package, which holds 'qwen3' alone: .* sere_compile/models/upcycled"
    if load is load_causal_lm:
        assert load("qwen3")[0].config.num_experts == 32
        with pytest.raises(ModelNotFoundError, match=told):
            load("upcycled")
    else:
        done = load("upcycled")
        assert done.exit_code == 1
        assert re.search(told, done.output)


def test_a_misspelt_model_of_the_package(monkeypatch):
    """Such a name is looked for on the hub; the error says what ours are called."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"'qwen4' .the package's own models are qwen3, mixtral, upcycled.: "):
        load_causal_lm("qwen4")
    with pytest.raises(ModelNotFoundError, match=r"'Qwen/none': "):
        load_causal_lm("Qwen/none")


def test_what_is_no_checkpoint(tmp_path):
    """Told without a look at the hub, and without its rules for names where a folder was meant."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, told in (
        ("/no/such/folder", "there is no such folder"),
        ("./folder", "there is no such folder"),
        ("no/such/folder", "there is no such folder"),
        ("", "there is no such folder"),
        (str(tmp_path / "empty"), "there is no config.json in it"),
        (str(tmp_path / "file"), "it is a file; give the folder"),
    ):
        with pytest.raises(ModelNotFoundError, match=f"could be loaded from '{name}': {told}"):
            load_causal_lm(name)
