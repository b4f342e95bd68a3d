"""What an operator asks of a whole pool."""
