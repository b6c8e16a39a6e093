"""A web page and an API for a registered model: the text that it generates, and how much of it is copied."""
