"""Options for files that a command writes when its work is done: that they can be written is checked first."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import MissingExtraError, OutputError
from ..whole_file import check_writable


class OutputFile(click.ParamType):
    """A file to write; its folder exists, and creating a file of this name there was tried."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as it was given."""
        try:
            check_writable(value)
        except OutputError as error:
            self.fail(str(error), param, ctx)
        return value


class ProfileFile(OutputFile):
    """A file for a similarity profile, whose name does not promise another format."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as it was given."""
        if Path(value).suffix not in ("", ".safetensors"):
            self.fail(f"{value!r}: profiles are .safetensors files", param, ctx)
        return super().convert(value, param, ctx)


class Page(OutputFile):
    """A file for a page, whose name does not promise another format."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as it was given."""
        if Path(value).suffix.lower() not in ("", ".html", ".htm"):
            self.fail(f"{value!r}: a page is an .html file", param, ctx)
        return super().convert(value, param, ctx)


class Picture(OutputFile):
    """A file whose name ends in a format that matplotlib writes."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as it was given."""
        from ..evaluation.pictures import picture_formats

        try:
            formats = picture_formats()
        except MissingExtraError as error:
            self.fail(str(error), param, ctx)
        if Path(value).suffix.removeprefix(".").lower() not in formats:
            self.fail(f"{value!r} does not end in one of {', '.join('.' + kind for kind in formats)}", param, ctx)
        return super().convert(value, param, ctx)
