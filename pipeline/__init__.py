"""The library that trains a GPT-2 on a text and registers it. README.md describes its packages."""
