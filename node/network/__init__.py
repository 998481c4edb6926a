"""The network: the only package that imports libp2p, with an in-memory fake beside it."""
