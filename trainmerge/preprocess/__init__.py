"""Task vectors -> task vectors, one method per file. Experts stay separate for the coefficients."""

from trainmerge.preprocess.aim import Aim
from trainmerge.preprocess.base import Calibrator, Informed, Preprocess, Router
from trainmerge.preprocess.breadcrumbs import Breadcrumbs
from trainmerge.preprocess.cache import apply, apply_for_one_pass, key_after
from trainmerge.preprocess.consensus import Consensus
from trainmerge.preprocess.core_space import CoreSpace, Knots
from trainmerge.preprocess.dare import Dare
from trainmerge.preprocess.della import Della
from trainmerge.preprocess.doge import Doge
from trainmerge.preprocess.fisher import Fisher
from trainmerge.preprocess.in_memory import apply_in_memory
from trainmerge.preprocess.iso import Iso
from trainmerge.preprocess.karcher import Karcher
from trainmerge.preprocess.localize import LocalizeAndStitch
from trainmerge.preprocess.magmax import MagMax
from trainmerge.preprocess.opcm import Opcm
from trainmerge.preprocess.optmerge import OptMerge
from trainmerge.preprocess.pcb import Pcb
from trainmerge.preprocess.pico import Pico
from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.preprocess.ram import Ram
from trainmerge.preprocess.rcp import Rcp
from trainmerge.preprocess.regmean import RegMean
from trainmerge.preprocess.routers import CalibratedRouters
from trainmerge.preprocess.sce import Sce
from trainmerge.preprocess.slerp import ModelStock, Slerp
from trainmerge.preprocess.svc import Svc
from trainmerge.preprocess.ties import Ties
from trainmerge.preprocess.trained_masks import TrainedMasks
from trainmerge.preprocess.trim import Magnitudes, Trim
from trainmerge.preprocess.tsv import Tsv
from trainmerge.preprocess.widen import Widen
from trainmerge.preprocess.wudi import Wudi
from trainmerge.task_vectors.pieces import in_pieces

__all__ = [
    "Aim",
    "Breadcrumbs",
    "CalibratedRouters",
    "Calibrator",
    "Consensus",
    "CoreSpace",
    "Dare",
    "Della",
    "Doge",
    "Fisher",
    "Informed",
    "Iso",
    "Karcher",
    "Knots",
    "LocalizeAndStitch",
    "MagMax",
    "Magnitudes",
    "ModelStock",
    "Opcm",
    "OptMerge",
    "Pcb",
    "Pico",
    "Piecewise",
    "Preprocess",
    "Ram",
    "Rcp",
    "RegMean",
    "Router",
    "Rule",
    "Sce",
    "Slerp",
    "Svc",
    "Ties",
    "TrainedMasks",
    "Trim",
    "Tsv",
    "Widen",
    "Wudi",
    "apply",
    "apply_for_one_pass",
    "apply_in_memory",
    "in_pieces",
    "key_after",
]
