"""Trains an adapter: the three stages of arXiv 2504.12395, or stages of your own.

Needs the packages of the extra ``training``; generating does not.
"""

from .config import Preview, Source, TrainingConfig
from .config_file import read_config
from .launch import prepare, train

__all__ = ["Preview", "Source", "TrainingConfig", "prepare", "read_config", "train"]
