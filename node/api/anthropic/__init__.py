"""The protocol of the Anthropic API: messages."""
