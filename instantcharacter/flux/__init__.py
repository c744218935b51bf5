"""diffusers' FLUX with a character."""
