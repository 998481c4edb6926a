"""What a node remembers: one SQLite file in its data directory, with the history and the peers it has met."""
