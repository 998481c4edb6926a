"""Storage: one SQLite file in the data directory, with history, known peers, chains and adoption trials."""
