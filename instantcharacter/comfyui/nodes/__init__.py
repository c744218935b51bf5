"""The nodes. Each has its schema and a few lines that call the library, imported when the node runs."""
