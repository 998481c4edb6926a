"""The consensus on the cost of methods, and its resistance to liars (docs/selection.md).

Everything here is pure: no clock, no I/O, integer arithmetic only. Signatures are verified before values come here.
"""
