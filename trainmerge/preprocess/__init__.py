"""Task vectors -> task vectors, one method a file. The experts stay apart, so coefficients can weigh them."""

from trainmerge.preprocess.breadcrumbs import Breadcrumbs
from trainmerge.preprocess.consensus import Consensus
from trainmerge.preprocess.dare import Dare
from trainmerge.preprocess.doge import Doge
from trainmerge.preprocess.opcm import Opcm
from trainmerge.preprocess.pcb import Pcb
from trainmerge.preprocess.preprocess import Preprocess, apply
from trainmerge.preprocess.ties import Ties
from trainmerge.preprocess.tsv import Tsv
from trainmerge.preprocess.widen import Widen
from trainmerge.preprocess.wudi import Wudi

__all__ = [
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "Doge",
    "Opcm",
    "Pcb",
    "Preprocess",
    "Ties",
    "Tsv",
    "Widen",
    "Wudi",
    "apply",
]
