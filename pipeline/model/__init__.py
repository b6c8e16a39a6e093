"""GPT-2: the network, its loss, evaluation and generation."""
