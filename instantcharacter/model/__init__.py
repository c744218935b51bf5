"""The adapter's network: tensors in, tensors out."""
