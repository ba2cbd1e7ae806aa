"""A picture: how near each pass comes to the copy's bandwidth, at its arithmetic intensity."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Achieved(NamedTuple):
    """One pass as measured."""

    name: str  # of the figure
    rate: float  # bytes a second
    width: int  # bytes of an element
    experts: int

    @property
    def intensity(self) -> float:
        """Operations a byte: of each expert a difference, a product and a sum an element."""
        return 3 * self.experts / ((self.experts + 2) * self.width)


def draw(path: Path, copy: float, passes: Sequence[Achieved]) -> None:
    """Points below the roof that a copy of `copy` bytes a second sets, and the share that each reaches."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (roof, shares) = pyplot.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1, 1.25))
    ends = [0.4, 2.0]
    roof.plot(ends, [copy * x / 1e9 for x in ends], color="black", label=f"copy, {copy / 1e9:.1f} GB/s")
    for backend, colour in (("eager", "tab:orange"), ("compiled", "tab:blue")):
        for form, marker in (("weighted_sum", "o"), ("inner_products", "s")):
            chosen = [one for one in passes if one.name.startswith(f"{form}_{backend}")]
            points = [one.intensity for one in chosen], [one.rate * one.intensity / 1e9 for one in chosen]
            roof.plot(*points, marker, color=colour, label=f"{form}, {backend}", alpha=0.8)
    roof.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="10⁹ operations a second")
    roof.set_xticks([0.5, 0.6, 1.0, 1.2, 2.0], ["0.5", "0.6", "1.0", "1.2", "2.0"], minor=False)
    heights = [2, 5, 10, 20, 50]
    roof.set_yticks(heights, [str(height) for height in heights], minor=False)
    roof.minorticks_off()
    roof.legend(fontsize=8, loc="upper left")
    names = [one.name for one in passes]
    colours = ["tab:blue" if "compiled" in name else "tab:orange" for name in names]
    shares.barh(names, [one.rate / copy for one in passes], color=colours)
    shares.axvline(1.0, color="black")
    shares.invert_yaxis()
    shares.tick_params(axis="y", labelsize=8)
    shares.set_xlabel("share of the copy's bandwidth")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
