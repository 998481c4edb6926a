"""Errors of models, with messages for users."""


class ModelError(Exception):
    """A model cannot be imported, found or used. The message is one line: what is wrong and what to do."""


class SourceError(ModelError):
    """A server failed, or could not be reached, for too long. Trying again later may help."""


class ContentError(ModelError):
    """A source gave another content than the manifest states: nothing that was read of it is worth keeping."""


class ManifestError(ModelError):
    """The bytes are not a valid manifest: their sender is at fault."""


class ChatTemplateError(ValueError):
    """The conversation cannot be rendered: the template refuses it or is broken. The message is one line."""


class TokenizerUnavailableError(ModelError):
    """This node cannot run the model's tokenizer now; neither the request nor the model's files are at fault."""


class TokenizerBusyError(TokenizerUnavailableError):
    """Too many requests wait for the same model's tokenizer. They can be retried later."""


class TokenizerEndedError(TokenizerUnavailableError):
    """The node is about to end."""

    def __init__(self) -> None:
        super().__init__("this node is shutting down: try again, or ask another peer")
