"""The measures of sentence embedders: Spearman's correlation of similarities, and nDCG of retrieval.

Legend: `N` texts, `B` of a batch, `E` width of an embedding, `P` pairs, `Q` queries, `M` documents.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainmerge.data.batch import Batch
from trainmerge.evaluate.pairs import CUT, Similar
from trainmerge.evaluate.task_texts import TaskTexts
from trainmerge.model.embedding import Embedding
from trainmerge.model.forward import forward
from trainmerge.system.distributed import merge_shares, own_share

TOGETHER = 64  # texts per forward pass


@torch.inference_mode()
def embed_texts(module: nn.Module, embedding: Embedding, texts: TaskTexts) -> Tensor:
    """Embeddings of unit norm, [N, E] float64 on the CPU. Several processes split the texts; all get them."""
    device = next(module.parameters()).device
    rows: dict[int, Tensor] = {}
    count = len(texts.examples)
    order = own_share(sorted(range(count), key=lambda i: len(texts.examples[i].text)))
    for first in range(0, len(order), TOGETHER):
        chosen = order[first : first + TOGETHER]
        inputs = {n: t.to(device) for n, t in texts.batch(chosen).inputs.items()}
        batch = Batch(0, inputs, inputs["attention_mask"].bool(), torch.tensor(chosen))
        found = forward(module, batch, None, (), embedding).embedding
        assert found is not None
        rows |= dict(zip(chosen, found.cpu(), strict=True))
    every = merge_shares(rows)
    return normalize(torch.stack([every[i] for i in range(count)]).double(), dim=-1)


def cosines(rows: Tensor, similar: Similar) -> Tensor:
    """The similarity of every pair, [N, E] -> [P]."""
    return (rows[similar.pairs[:, 0]] * rows[similar.pairs[:, 1]]).sum(dim=-1)


def ndcg(rows: Tensor, similar: Similar) -> Tensor:
    """nDCG at 10 of every query with relevant documents of gain 1, [N, E] -> [Q].

    Järvelin and Kekäläinen (2002). Documents are ordered by their similarity to the query; of equal ones the
    first in the file comes first.
    """
    assert similar.documents is not None
    queries = int(similar.pairs[:, 0].max()) + 1
    relevant = torch.zeros(queries, len(rows), dtype=torch.bool)
    relevant[similar.pairs[:, 0], similar.pairs[:, 1]] = True
    relevant = relevant[:, similar.documents]  # [Q, M]
    found = (rows[:queries] @ rows[similar.documents].T).argsort(dim=-1, descending=True, stable=True)
    discounts = 1 / torch.arange(2, CUT + 2, dtype=torch.float64).log2()
    gains = relevant.gather(1, found[:, :CUT]).double()
    ideal = torch.stack([discounts[: int(n)].sum() for n in relevant.sum(dim=1).clamp_max(CUT)])
    return (gains * discounts[: gains.shape[1]]).sum(dim=1) / ideal
