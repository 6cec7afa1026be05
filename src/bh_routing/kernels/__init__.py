"""The decision as one operation: the PyTorch reference, and the Triton kernel beside it."""
