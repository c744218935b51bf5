"""Pictures of the toy world on disk: an album for the models, image folders for the adapter."""
