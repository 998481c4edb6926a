"""Diagnosis: why a node cannot start, join, be reached or serve, and why a model is incomplete."""
