"""What peers say to each other: bytes to values and back. No I/O, no clock, no torch, no libp2p, no trio."""
