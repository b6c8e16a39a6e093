"""The command `doctor`, and the chat in the terminal."""
