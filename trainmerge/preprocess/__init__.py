"""Task vectors -> task vectors, one method per file. Experts stay separate for the coefficients."""

from trainmerge.preprocess.base import Calibrator, Informed, Preprocess, Router
from trainmerge.preprocess.breadcrumbs import Breadcrumbs
from trainmerge.preprocess.cache import apply, apply_for_one_pass, key_after
from trainmerge.preprocess.consensus import Consensus
from trainmerge.preprocess.dare import Dare
from trainmerge.preprocess.doge import Doge
from trainmerge.preprocess.fisher import Fisher
from trainmerge.preprocess.in_memory import apply_in_memory
from trainmerge.preprocess.opcm import Opcm
from trainmerge.preprocess.optmerge import OptMerge
from trainmerge.preprocess.pcb import Pcb
from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.preprocess.rcp import Rcp
from trainmerge.preprocess.regmean import RegMean
from trainmerge.preprocess.routers import CalibratedRouters
from trainmerge.preprocess.slerp import ModelStock, Slerp
from trainmerge.preprocess.ties import Ties
from trainmerge.preprocess.tsv import Tsv
from trainmerge.preprocess.widen import Widen
from trainmerge.preprocess.wudi import Wudi
from trainmerge.task_vectors.pieces import in_pieces

__all__ = [
    "Breadcrumbs",
    "CalibratedRouters",
    "Calibrator",
    "Consensus",
    "Dare",
    "Doge",
    "Fisher",
    "Informed",
    "ModelStock",
    "Opcm",
    "OptMerge",
    "Pcb",
    "Piecewise",
    "Preprocess",
    "Rcp",
    "RegMean",
    "Router",
    "Rule",
    "Slerp",
    "Ties",
    "Tsv",
    "Widen",
    "Wudi",
    "apply",
    "apply_for_one_pass",
    "apply_in_memory",
    "in_pieces",
    "key_after",
]
