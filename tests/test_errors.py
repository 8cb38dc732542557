"""What the exceptions are."""

from sere_compile import ProfileError


def test_profile_error_is_a_value_error():
    """Callers may catch the built-in class."""
    assert issubclass(ProfileError, ValueError)
