"""The engine of GGUF packages: unmodified llama.cpp runs a span of blocks as a smaller model of the same architecture.

`library` binds llama.cpp, `span_file` writes the span's GGUF, `context` computes rows of many sequences, `shard` serves
sessions over it, `granularity` finds where an architecture may be cut. Nothing here imports torch or transformers.
"""
