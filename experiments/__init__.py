"""Entry points and the list of what is run."""
