"""What the selector needs of the world: files of measurements, a clock, and a process to train in."""
