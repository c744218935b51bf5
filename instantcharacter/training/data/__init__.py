"""From sources of pictures to batches: reading, caching of what the frozen models make of them, batching."""
