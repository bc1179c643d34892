"""Dtypes, rounding, products and inverse roots."""
