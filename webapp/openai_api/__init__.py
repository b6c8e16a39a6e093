"""The OpenAI completions protocol: bodies, errors, models and routes."""
