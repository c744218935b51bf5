"""Bytes on disk and on the hub: safe reading, atomic writing, the catalogue of model files, downloading."""
