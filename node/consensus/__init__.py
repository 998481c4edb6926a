"""The consensus in the daemon: epochs, gossip, what was missed, what is kept. It decides by selector.consensus."""
