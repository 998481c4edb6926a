"""Capabilities of this node: probed, measured, observed in traffic, and announced to the swarm."""
