"""Whole optimizers: one `optax.chain` each."""
