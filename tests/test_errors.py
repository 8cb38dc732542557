"""What the exceptions are, and that wrong arguments get them."""

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import (
    ArgumentError,
    CalibrationError,
    ConfigError,
    LoweringError,
    ProfileError,
    SereConfig,
    SimilarityProfile,
)
from sere_compile.errors import expect

PROFILE = SimilarityProfile({"gate.weight": torch.eye(4)})


def test_profile_error_is_a_value_error():
    """Callers may catch the built-in class."""
    assert issubclass(ProfileError, ValueError)
    assert issubclass(ArgumentError, TypeError)


def test_an_argument_of_another_type():
    expect(3, (int, str), "it takes a number")
    with pytest.raises(ArgumentError, match=r"^it takes a number, got NoneType$"):
        expect(None, int, "it takes a number")


WRONG = {
    "attach": (lambda: sere_compile.attach(len, PROFILE), "attach takes a torch.nn.Module, got builtin_function"),
    "detach": (lambda: sere_compile.detach(None), "detach takes a torch.nn.Module, got NoneType"),
    "calibrate": (lambda: sere_compile.calibrate(len, []), "calibrate takes a torch.nn.Module, got builtin"),
    "evaluate": (lambda: sere_compile.evaluate(None, torch.ones(1, 2)), "evaluate takes a torch.nn.Module"),
    "pack": (lambda: sere_compile.pack_experts("gpt-oss"), "pack_experts takes a torch.nn.Module, got str"),
    "stats": (lambda: sere_compile.stats(len), "stats takes a torch.nn.Module or a vllm.LLM, got builtin"),
    "reset": (lambda: sere_compile.reset_stats(len), "reset_stats takes a torch.nn.Module, got builtin"),
    "explain": (lambda: sere_compile.explain(None), "explain takes a torch.nn.Module or a function, got NoneType"),
    "compile": (lambda: sere_compile.compile("model"), "compile takes a torch.nn.Module or a function, got str"),
    "compile nothing": (lambda: sere_compile.compile(None), "compile takes a torch.nn.Module or a function"),
    "rewrite": (lambda: sere_compile.rewrite(nn.Linear(2, 2)), "rewrite takes a GraphModule or an ExportedProgram"),
    "rewrite nothing": (lambda: sere_compile.rewrite(None), "torch.export.export.model, args. makes of a model"),
    "load": (lambda: SimilarityProfile.load(None), "SimilarityProfile.load takes the path of a file, got None"),
    "save": (lambda: PROFILE.save(3), "SimilarityProfile.save takes the path of a file, got int"),
    "reference": (lambda: SimilarityProfile.from_reference(None), "from_reference takes the path of a file or"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_no_model_and_no_path(name):
    call, told = WRONG[name]
    with pytest.raises(ArgumentError, match=told):
        call()


def traced():
    return torch.fx.symbolic_trace(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda config: sere_compile.explain(nn.Linear(2, 2), torch.ones(2), config=config),
        lambda config: sere_compile.rewrite(traced(), config=config),
    ],
    ids=["explain", "rewrite"],
)
def test_options_in_the_place_of_a_configuration(call):
    with pytest.raises(ConfigError, match=r"got dict: give SereConfig\(\*\*\{'select_top_k': 1\}\)"):
        call({"select_top_k": 1})
    with pytest.raises(ConfigError, match=r"config must be a SereConfig, got int"):
        call(3)


def test_matrices_in_the_place_of_a_profile():
    with pytest.raises(ProfileError, match=r"rewrite takes a SimilarityProfile, got dict"):
        sere_compile.rewrite(traced(), profile={"gate.weight": torch.eye(4)})


@pytest.mark.parametrize("threshold", [10**400, -(10**5000)], ids=["large", "too long to print"])
def test_a_threshold_that_no_float_holds(threshold):
    with pytest.raises(ConfigError, match=r"threshold must be a finite number, got a whole number of \d+ bits"):
        SereConfig(threshold=threshold)
    assert SereConfig(threshold=10**300).threshold == 10**300


def test_options_that_are_no_mapping():
    with pytest.raises(Exception, match=r"options must be \{option: value\}, got \[1\]") as caught:
        torch.compile(nn.Linear(2, 2), backend="sere", options=[1])(torch.ones(2))
    assert isinstance(caught.value.inner_exception, ConfigError)


def test_a_batch_that_the_model_does_not_take():
    with pytest.raises(
        CalibrationError, match=r"^the model cannot be called with this batch: RuntimeError: .* \(.*\.py:\d+\)$"
    ):
        sere_compile.calibrate(nn.Sequential(nn.Linear(4, 2)), [torch.ones(3, 7)], progress=False)


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(stable=True)[0]


def test_an_operator_that_torch_onnx_does_not_know():
    pytest.importorskip("onnxscript")
    from sere_compile.lowering.onnx_functions import translate

    program = torch.export.export(Sorted(), (torch.ones(3),))
    with pytest.raises(LoweringError, match=r"torch\.onnx does not translate the program: .*aten\.sort"):
        translate(program, 18, None, None)
