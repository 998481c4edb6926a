"""The protocols of OpenAI: chat completions, completions, responses."""
