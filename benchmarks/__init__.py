"""Benchmarks, each a command of its own: those cited in docs/performance.md, and others."""
