"""Comments beside the fields of a configuration in, what the reference says of the fields out.

The reference is made of docstrings; what a field means stands beside it as a comment, or in pydantic's description.
"""

import re

import griffe

DESCRIPTION = re.compile(r"description=(?:\"([^\"]*)\"|'([^']*)')")


class FieldComments(griffe.Extension):
    """Named in mkdocs.yml."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        """Called for each attribute of the modules that are read."""
        if attr.docstring is None and attr.lineno and (said := self.said(attr)):
            attr.docstring = griffe.Docstring(said, parent=attr)

    @staticmethod
    def said(attr: griffe.Attribute) -> str:
        """The comment on the field's last line, or its description; nothing where there is none."""
        assert attr.lineno is not None
        lines = attr.lines_collection[attr.filepath][attr.lineno - 1 : attr.endlineno]
        if match := DESCRIPTION.search("\n".join(lines)):
            return match[1] or match[2]
        return lines[-1].partition("  # ")[2].partition("  # ")[0]
