"""The consensus in the daemon: turns of the epoch, gossip, anti-entropy, storage. `selector.consensus` decides."""
