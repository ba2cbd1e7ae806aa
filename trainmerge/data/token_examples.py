"""Examples whose tokens are known, because a model wrote them; a tokenizer might split the text otherwise.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Sequence

import torch

from trainmerge.data.encoded import Encoded
from trainmerge.data.examples import Example


def encode_tokens(examples: Sequence[Example], padding: int) -> Encoded:
    """Inputs [B, T] padded on the right; a position counts if its next token is in a span of tokens.

    >>> long, short = Example("", ((1, 3),), tokens=(7, 8, 9)), Example("", ((1, 2),), tokens=(5, 6))
    >>> encode_tokens([long, short], 0).mask
    tensor([[ True,  True, False],
            [ True, False, False]])
    """
    rows = [example.tokens or () for example in examples]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    mask = torch.zeros_like(real, dtype=torch.bool)
    for i, example in enumerate(examples):
        for begin, end in example.spans or ():
            mask[i, begin - 1 : end - 1] = True
    return Encoded({"input_ids": ids, "attention_mask": real}, mask)
