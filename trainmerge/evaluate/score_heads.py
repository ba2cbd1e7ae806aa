"""Measures of experts' own heads that are not one class per text: tokens, spans, labels, values.

Each example gives plain numbers, which processes exchange; the measures are taken of all of them at once.

Legend: `N` examples, `B` of a batch, `T` tokens, `V` labels or numbers.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainmerge.data.batch import Kind
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.answers import UNCOUNTED
from trainmerge.system.correlation import rank_terms, standardised

LONGEST = 30  # tokens of an answer, as in transformers' own question answering
Found = Sequence[Any]  # one example's numbers
Measures = tuple[dict[str, float], Tensor]  # and every example's contribution to the score's sum and count


def found_in(
    kind: Kind, logits: Tensor, examples: Sequence[Example], answers: Sequence[Any], tokenize: Tokenizer
) -> list[Found]:
    """What each example contributes to the measures; `logits` are those of its kind."""
    if kind == "tokens":
        return _token_labels(logits, examples, answers, tokenize)
    if kind == "spans":
        return _answers(logits, examples, answers, tokenize)
    if kind == "labels":
        says = (logits[..., 0] > logits[..., 1]).tolist()
        return [(own, sorted(set(told))) for own, told in zip(says, answers, strict=True)]
    return list(zip(logits.double().tolist(), answers, strict=True))


def measures_of(kind: Kind, found: Sequence[Found]) -> Measures:
    """The measures of all examples' numbers; the first is the score."""
    of: Mapping[Kind, Callable[[Sequence[Found]], Measures]] = {
        "tokens": _of_tokens, "spans": _of_spans, "labels": _of_labels, "values": _of_values,
    }  # fmt: skip
    return of[kind](found)


def _token_labels(
    logits: Tensor, examples: Sequence[Example], answers: Sequence[Any], tokenize: Tokenizer
) -> list[Found]:
    """(predicted, right) of each word's first token; words that are cut off do not count."""
    encoded = tokenize.pairs(examples, offsets=True)
    says = logits.argmax(-1).tolist()
    found: list[Found] = []
    for i, (example, told) in enumerate(zip(examples, answers, strict=True)):
        begins = [word.start() for word in re.finditer(r"\S+", example.text)]
        ends = [word.end() for word in re.finditer(r"\S+", example.text)]
        sequences, pairs = encoded.sequence_ids(i), []
        places: dict[int | None, int] = {}
        for t, (begin, end) in enumerate(encoded["offset_mapping"][i].tolist()):
            if sequences[t] == 0 and end > begin:
                word = next((w for w, last in enumerate(ends) if last > begin and end > begins[w]), None)
                places.setdefault(word, t)
        for word, label in enumerate(told):
            if label != UNCOUNTED and word in places:
                pairs.append((says[i][places[word]], label))
        found.append(pairs)
    return found


def _of_tokens(found: Sequence[Found]) -> Measures:
    """Accuracy over labelled tokens, and the mean of the labels' F1."""
    right = [(float(sum(a == b for a, b in pairs)), float(len(pairs))) for pairs in found]
    all_pairs = [pair for pairs in found for pair in pairs]
    predicted, true = Counter(a for a, _ in all_pairs), Counter(b for _, b in all_pairs)
    hits = Counter(a for a, b in all_pairs if a == b)
    f1 = [2 * hits[label] / (predicted[label] + true[label]) for label in true.keys() | predicted.keys()]
    outcomes = torch.tensor(right, dtype=torch.float64)
    accuracy = float(outcomes[:, 0].sum() / outcomes[:, 1].sum())
    return {"accuracy": accuracy, "macro_f1": sum(f1) / max(1, len(f1))}, outcomes


def _answers(
    logits: Tensor, examples: Sequence[Example], answers: Sequence[Any], tokenize: Tokenizer
) -> list[Found]:
    """(exact match, F1) of the best span in the second text; no answer is the first position's."""
    encoded = tokenize.pairs(examples, offsets=True)
    found: list[Found] = []
    for i, (example, told) in enumerate(zip(examples, answers, strict=True)):
        inside = torch.tensor([part == 1 for part in encoded.sequence_ids(i)])
        begin, end = logits[i].double().cpu()
        score = begin[:, None] + end[None, :]  # [T, T]
        sound = (inside[:, None] & inside[None, :]).triu().tril(LONGEST - 1)
        best = int(score.masked_fill(~sound, -torch.inf).argmax())
        first, last = divmod(best, len(end))
        offsets = encoded["offset_mapping"][i].tolist()
        text = (example.pair or "")[offsets[first][0] : offsets[last][1]] if sound.any() else ""
        if not told and (not sound.any() or begin[0] + end[0] > score[first, last]):
            text = ""
        found.append(_agreement(text, told or [""]))
    return found


def _agreement(text: str, answers: Sequence[str]) -> tuple[float, float]:
    """SQuAD's exact match and F1 over words (Rajpurkar et al., EMNLP 2016), with the best of the answers."""
    scores = []
    for answer in answers:
        mine, theirs = _plain(text), _plain(answer)
        common = sum((Counter(mine) & Counter(theirs)).values())
        empty = not mine or not theirs
        f1 = float(mine == theirs) if empty else 2 * common / (len(mine) + len(theirs))
        scores.append((float(mine == theirs), f1))
    return max(one for one, _ in scores), max(f1 for _, f1 in scores)


def _plain(text: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _of_spans(found: Sequence[Found]) -> Measures:
    exact = torch.tensor([[one, 1.0] for one, _ in found], dtype=torch.float64)
    f1 = sum(own for _, own in found) / len(found)
    return {"exact_match": float(exact[:, 0].mean()), "f1": f1}, exact


def _of_labels(found: Sequence[Found]) -> Measures:
    """F1 over all labels of all texts, and the share of texts with every label right."""
    outcomes, exact = [], 0
    for says, told in found:
        predicted = {i for i, yes in enumerate(says) if yes}
        outcomes.append((2.0 * len(predicted & set(told)), float(len(predicted) + len(told))))
        exact += predicted == set(told)
    sums = torch.tensor(outcomes, dtype=torch.float64)
    total = float(sums[:, 1].sum())
    f1 = float(sums[:, 0].sum()) / total if total else 1.0
    return {"f1": f1, "exact_match": exact / len(found)}, sums


def _of_values(found: Sequence[Found]) -> Measures:
    """Pearson's and Spearman's correlation, and the mean squared error, over all numbers.

    An example's contribution to Pearson's is the product of its standardised numbers.
    """
    mine, told = (torch.tensor([own[side] for own in found], dtype=torch.float64) for side in (0, 1))
    one, other = (standardised(side.flatten()) for side in (mine, told))
    products = (one * other).view(len(found), -1)
    measures = {
        "pearson": float((one * other).mean()),
        "spearman": float(rank_terms(mine.flatten(), told.flatten()).mean()),
        "mse": float((mine - told).square().mean()),
    }
    return measures, torch.stack([products.mean(dim=1), torch.ones(len(found), dtype=torch.float64)], dim=1)
