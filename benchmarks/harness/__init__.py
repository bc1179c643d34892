"""What every benchmark shares: compiled steps, alternating timing, the machine's description, tables and JSON."""
