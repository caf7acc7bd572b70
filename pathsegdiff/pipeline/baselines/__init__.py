"""Networks that learn from the images themselves: rows of the comparison table."""
