"""The protocol of Ollama: its chat, its completions, and what it tells of models."""
