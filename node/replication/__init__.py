"""Replication: gossip with anti-entropy behind it, so that every peer ends with the same set of records."""
