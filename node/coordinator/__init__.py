"""The coordinator: the client half of a job. Prompt, planner, route, failover, result, observation."""
