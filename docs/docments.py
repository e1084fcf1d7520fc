"""A griffe extension: comments beside parameters and fields (fastcore's docments) become tables in the reference."""
import dataclasses
import importlib
import re

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
