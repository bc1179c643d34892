"""When the blocks of a stack are started, observed and refreshed, and how their factors apply."""
