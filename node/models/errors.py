"""What can be wrong with a model, in words for its user."""


class ModelError(Exception):
    """A model cannot be imported, found or used. The message is one line: what is wrong and what to do."""


class ManifestError(ModelError):
    """The bytes are no manifest: the fault of whoever made or sent them."""


class ChatTemplateError(ValueError):
    """The conversation cannot be rendered: the template refuses it or is broken. The message is one line."""
