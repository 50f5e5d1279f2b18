"""How the fields of a configuration section are declared."""

from dataclasses import field


def option(default, doc, **checks):
    """A field with its default, its meaning and its range (`ge`, `gt`, `le`, `lt`, `pattern`)."""
    metadata = {"doc": doc, **checks}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(doc, **checks):
    return field(metadata={"doc": doc, **checks})
