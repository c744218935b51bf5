"""From a picture to a character."""
