"""diffusers' FLUX with a character.

``load`` makes a ``pipeline`` of files, ``lora`` adds styles to it. ``attn_processor`` brings character attention into
FLUX's blocks, ``schedule`` gives each step its characters, ``components`` and ``offloading`` connect the pipeline to
:mod:`instantcharacter.offload`, and ``compile`` has torch compile the blocks.
"""
