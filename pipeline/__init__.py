"""The library: text in, a registered GPT-2 out. Modules are listed in reading order in the README."""
