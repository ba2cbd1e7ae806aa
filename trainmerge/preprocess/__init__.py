"""Task vectors -> task vectors, one method a file. The experts stay apart, so coefficients can weigh them."""

from trainmerge.preprocess.preprocess import Preprocess, apply
from trainmerge.preprocess.ties import Ties

__all__ = ["Preprocess", "Ties", "apply"]
