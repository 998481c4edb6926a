"""Fakes that stand in for the network, the engine and the disk, for tests, simulations and benchmarks."""
