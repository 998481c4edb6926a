"""What peers agree on about the cost of methods, and how that holds against liars (docs/selection.md).

Everything here is pure: values in, values out. Peers are known by their ids, statements by their digests; who signed
what is checked before it comes here. All arithmetic that peers must agree on is done in integers.
"""
