"""Import what only an extra installs."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingExtraError


def require(extra: str, *modules: str, needed_for: str = "this needs") -> list[ModuleType]:
    """Import optional dependencies.

    Args:
        extra: the extra of sere-compile that installs them.
        modules: to import, full names.
        needed_for: subject and verb of the error's message: what the user asked for.

    Returns:
        The modules.

    Raises:
        MissingExtraError: one is not installed; the message names the extra.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        missing = error.name or modules[0]
        raise MissingExtraError(f"{needed_for} {missing}: pip install 'sere-compile[{extra}]'") from error
