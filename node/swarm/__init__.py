"""Who is there and who serves what: membership, heartbeats and the directory."""
