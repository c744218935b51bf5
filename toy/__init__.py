"""The toy world, models of the real ones' classes that learn from it, and measures of what they learn."""
