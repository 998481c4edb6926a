"""Backends of the engine: how the blocks of a span are computed."""
