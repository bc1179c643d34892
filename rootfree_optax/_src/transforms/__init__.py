"""Gradient transformations: state, init and update."""
