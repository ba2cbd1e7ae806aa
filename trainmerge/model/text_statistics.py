"""Statistics of the merged model's predictions, text by text: gradients, likelihoods, divergences.

Legend: `N` texts, `R` rows, `V` vocabulary or classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trainmerge.data.batch import Batch
from trainmerge.kernels import accumulation_dtype
from trainmerge.model.loss_scale import LossScale, scaled_gradients
from trainmerge.model.predictions import jensen_shannon, predictions
from trainmerge.model.resident import Resident
from trainmerge.task_vectors.places import view

PREDICTIONS = 256 << 20  # bytes of the base's predictions stored at a time


def text_gradients(
    resident: Resident, batches: Iterable[Batch], dice: torch.Generator | None
) -> Iterator[dict[str, Tensor]]:
    """Gradients of a loss with respect to every merged parameter, batch by batch.

    With `dice`: -log p(y | x) of a y drawn at every unmasked position, whose mean square is the Fisher
    information. Otherwise the language-model loss: the mean over the text's next tokens.
    """
    gradients = _gradients_of(resident)
    for batch in batches:
        with torch.enable_grad():
            log_p, tokens = predictions(resident(batch), batch)
            if dice is not None:
                tokens = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=dice)[:, 0]
            each = -log_p.gather(-1, tokens.to(log_p.device)[:, None])
            loss = each.sum() if dice is not None else each.mean()
            slopes = gradients(loss)
        yield slopes


def imitated(
    resident: Resident, batches: Iterable[Batch], told: Sequence[Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Mean KL(told || model) over all rows of the batches, in nats, and its gradients of merged parameters.

    `told` are log-probabilities [R, V], one tensor per batch. Cells that they exclude count nothing.
    """
    rows = sum(len(own) for own in told)
    loss, total, gradients = 0.0, dict[str, Tensor](), _gradients_of(resident)
    for batch, own in zip(batches, told, strict=True):
        with torch.enable_grad():
            log_p, _ = predictions(resident(batch), batch)
            own = own.to(log_p)
            never = own.isneginf()
            apart = own.masked_fill(never, 0.0) - log_p.masked_fill(never, 0.0)
            part = (own.exp() * apart).sum() / rows
            slopes = gradients(part)
        loss += float(part.detach())
        for name, slope in slopes.items():
            wide = slope.to(accumulation_dtype(slope.dtype), copy=name not in total)
            total[name] = total[name].add_(wide) if name in total else wide
    return loss, total


def _gradients_of(resident: Resident) -> Callable[[Tensor], dict[str, Tensor]]:
    """Gives a loss's gradients of every merged parameter that is learned; zeros where it depends on none."""
    merged = resident.merged
    owners = {id(p): p for p in merged.placed.owners.values() if p.requires_grad}
    parameters = {n: p for n, p in merged.parameters.items() if id(merged.placed.owners[n]) in owners}
    scale = LossScale.of(merged.module)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        slopes = dict(zip(owners, scaled_gradients(loss, list(owners.values()), scale), strict=True))
        return {
            name: torch.zeros_like(p) if slope is None else view(merged.placed.inside[name], slope)
            for name, p in parameters.items()
            for slope in [slopes[id(merged.placed.owners[name])]]
        }

    return gradients


@torch.no_grad()
def likelihoods(resident: Resident, batches: Iterable[Batch]) -> Tensor:
    """Log-likelihood of each text under the model that is in memory, [N] float64: summed over tokens."""
    found = []
    for batch in batches:
        log_p, tokens = predictions(resident(batch), batch)
        found.append(log_p.gather(-1, tokens[:, None]).double().sum())
    return torch.stack(found).cpu()


@torch.no_grad()
def divergences(resident: Resident, expert: int, batches: Sequence[Batch]) -> Tensor:
    """Mean Jensen-Shannon divergence of base and expert on each text, [N] float64, in nats.

    Stores the base's predictions of as many texts as fit into PREDICTIONS bytes, at least one.
    """
    merged = resident.merged
    found: list[Tensor] = []
    while left := batches[len(found) :]:
        with merged.uniform(torch.zeros(len(merged.task_vectors.experts)), everywhere=True):
            bases = _first_predictions(resident, left)
        with merged.teacher(expert):
            for batch, base in zip(left, bases, strict=False):
                own, _ = predictions(resident(batch), batch)
                found.append(jensen_shannon(base, own))
    return torch.stack(found).cpu()


def _first_predictions(resident: Resident, batches: Iterable[Batch]) -> list[Tensor]:
    """Log-probabilities [R, V] of the first texts, up to PREDICTIONS bytes."""
    stored: list[Tensor] = []
    for batch in batches:
        stored.append(predictions(resident(batch), batch)[0])
        if sum(log_p.nbytes for log_p in stored) > PREDICTIONS:
            break
    return stored
