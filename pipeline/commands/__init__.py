"""The commands, one a module: its docstring is its help, `add_arguments` adds its arguments, `run` runs it.

A command imports what it needs when it runs, so that help and short commands start without torch and MLflow.
"""
