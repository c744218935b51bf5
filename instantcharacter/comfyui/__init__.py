"""ComfyUI's side: the only place that imports it."""
