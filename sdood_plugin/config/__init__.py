"""The settings: one frozen dataclass a stage, checked when made; a run's configuration is their sum.

Fractions lie in [0, 1]; `steps` are optimiser steps; names follow the paper (C clusters, T timesteps, w, S, k, alpha).
"""

from .clustering import ClusteringConfig
from .compare import Comparator, CompareConfig
from .data import DataConfig, Group, ImagesConfig, OODConfig
from .detector import DetectorConfig, ScoringConfig
from .diffusion import DiffusionConfig
from .outliers import Mode, OutliersConfig
from .run import RunConfig, as_dict, key_dict
from .selection import KINDS, InspectionConfig, Kind, SelectionConfig

__all__ = [
    "KINDS",
    "ClusteringConfig",
    "Comparator",
    "CompareConfig",
    "DataConfig",
    "DetectorConfig",
    "DiffusionConfig",
    "Group",
    "ImagesConfig",
    "InspectionConfig",
    "Kind",
    "Mode",
    "OODConfig",
    "OutliersConfig",
    "RunConfig",
    "ScoringConfig",
    "SelectionConfig",
    "as_dict",
    "key_dict",
]
