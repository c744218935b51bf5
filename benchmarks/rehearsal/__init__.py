"""A dress rehearsal: files of the released sizes in a real ComfyUI, on a real GPU, through its queue."""
