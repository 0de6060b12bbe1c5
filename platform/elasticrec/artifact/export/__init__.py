"""A bundle in, a file for a runtime without Ray out."""
