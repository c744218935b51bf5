"""Makes the files that users have: names, layouts and sizes of the released ones, random numbers in them."""
