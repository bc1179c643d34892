"""Numbers of the experiments on small networks, and how they are drawn."""
