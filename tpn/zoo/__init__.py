"""Names, weights and where they come from."""
