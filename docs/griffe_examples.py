"""Shows `Example:` of a docstring as code: the parser of the documentation knows that section as `Examples:` alone."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section in every docstring, when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
