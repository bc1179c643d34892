"""The mathematics of one array or one block."""
