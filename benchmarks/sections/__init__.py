"""The sections of the benchmark of the Kronecker methods."""
