"""The HTTP API of a daemon, in the shapes of the OpenAI API, and the swarm's own pages."""
