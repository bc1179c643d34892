"""Sets of structured matrices, for the factors of Kronecker preconditioners."""
