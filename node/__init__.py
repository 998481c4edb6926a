"""Everything with effects: the libp2p host, storage, the engine, jobs, the HTTP API and the command line."""
