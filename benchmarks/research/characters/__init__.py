"""A decoder transformer over the characters of Python's standard library, trained with each optimizer."""
