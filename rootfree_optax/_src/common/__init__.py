"""What every room may use: validation, schedules, trees, and differences between JAX versions."""
