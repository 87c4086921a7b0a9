"""Video files to tensors."""
