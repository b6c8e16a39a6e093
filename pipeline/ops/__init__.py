"""The doctor, and the chat in the terminal."""
