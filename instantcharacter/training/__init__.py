"""Training an adapter: arXiv 2504.12395's three stages, or stages of your own.

Needs the packages of the extra ``training``; drawing does not.
"""

from .config import Preview, Source, TrainingConfig, read_config
from .trainer import prepare, train

__all__ = ["Preview", "Source", "TrainingConfig", "prepare", "read_config", "train"]
