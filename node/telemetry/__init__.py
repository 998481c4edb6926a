"""What operators see of a node from outside: metrics, the log of jobs, and traces."""
