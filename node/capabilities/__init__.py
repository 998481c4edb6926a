"""What this node is capable of: read from the system, measured, observed in traffic, and told to the swarm."""
