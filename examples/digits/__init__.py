"""What train_digits.py trains, with which methods, and what it shows."""
