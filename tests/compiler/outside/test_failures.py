"""Errors in a few words."""

from sere_compile.compiler.outside.failures import short


class TestWhatIsMadeUp:
    def test_an_error_in_a_few_words(self):
        assert short(ValueError("first\nsecond")) == "ValueError: first"
        assert short(KeyError()) == "KeyError: "
        assert len(short(RuntimeError("x" * 500))) == len("RuntimeError: ") + 120
