"""Which weights are on the GPU, and how the rest come; knows modules and bytes alone."""
