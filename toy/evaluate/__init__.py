"""Measures toy adapters: a judge that characters at pictures, and adapters that lack a part."""
