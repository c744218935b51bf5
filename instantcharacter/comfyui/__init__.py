"""ComfyUI's side. Only this folder, and the root's ``nodes.py``, import ComfyUI."""
