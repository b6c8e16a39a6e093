"""The app: a registered model -> a page and an API that show what it writes, and how much of that is memory."""
