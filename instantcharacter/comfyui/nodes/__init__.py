"""The nodes: for each its schema, and a few lines that hand over to the library."""
