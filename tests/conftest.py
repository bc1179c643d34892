"""Session-wide settings: strict promotion, and eight host devices for the sharding tests."""

import os

# Before jax is imported: the number of host devices is fixed when the backend starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
