"""Measures toy adapters: a judge that looks at pictures, and adapters that lack a part."""
