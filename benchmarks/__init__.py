"""Measurements, each one command: those whose figures the README tells, and others."""
