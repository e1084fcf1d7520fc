"""A griffe extension: comments beside parameters and fields (fastcore's docments) become tables in the reference."""
import dataclasses
import importlib
import io
import re
import tokenize

import griffe
from fastcore.docments import docments


def live(obj: griffe.Object):
    """The object itself; importing the library is harmless and fast."""
    found = importlib.import_module(obj.module.path)
    for name in obj.path[len(obj.module.path) + 1:].split("."):
        found = getattr(found, name)
    return found


def plain(text: str) -> str:
    """A comment as one line of Markdown that does not start a quotation or a list."""
    return re.sub(r"^([>#*+-])", r"\\\1", " ".join(text.split()))


def remark(lines: list[str]) -> str:
    """The comment beside an assignment, where there is one: on its first line or on its last."""
    tokens = tokenize.generate_tokens(io.StringIO("".join(lines)).readline)
    return next((token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT
                 and token.start[0] in (1, len(lines))), "")


class Docments(griffe.Extension):
    """Adds what the source says in comments to what griffe reads."""

    def on_function(self, *, func: griffe.Function, **_) -> None:
        if func.docstring is None or func.name.startswith("_"):
            return
        said = {name: plain(text) for name, text in docments(live(func)).items() if text}
        returned = said.pop("return", None)
        lines = [f"    {name}: {text}" for name, text in said.items() if name in func.parameters]
        if lines:
            func.docstring.value += "\n\nArgs:\n" + "\n".join(lines)
        if returned:
            func.docstring.value += f"\n\nReturns:\n    {returned}"

    def on_class(self, *, cls: griffe.Class, **_) -> None:
        found = live(cls)
        if not dataclasses.is_dataclass(found):
            return
        for name, text in docments(found).items():
            if text and name in cls.members and cls.members[name].docstring is None:
                cls.members[name].docstring = griffe.Docstring(plain(text), parent=cls.members[name])

    def on_attribute(self, *, attr: griffe.Attribute, **_) -> None:
        if not attr.parent.is_module or attr.docstring is not None or attr.name.startswith("_"):
            return
        if text := remark(attr.lines_collection[attr.filepath][attr.lineno - 1:attr.endlineno]):
            attr.docstring = griffe.Docstring(plain(text), parent=attr)
