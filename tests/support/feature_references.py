"""Float64 definitions of the losses of features, straight from the mathematics.

They are loops over scalars, slow and obvious.

They share nothing with `stages/losses/features/`: probabilities instead of logarithms, one sample
and one group at a time, only terms that exist are ever written down. The gradient is autograd's of
these loops.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

import torch
from torch import Tensor

Sees = Callable[[int, int], bool]


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((x * y for x, y in zip(a, b, strict=True)), start=a.new_zeros(()))


def length(a: Tensor) -> Tensor:
    """|a|; at 0 it has no gradient, and a constant stands for it."""
    squared = dot(a, a)
    return squared.sqrt() if float(squared.detach()) > 0 else squared.detach()


def softmax(scores: Sequence[Tensor]) -> list[Tensor]:
    highest = max(float(score.detach()) for score in scores)
    weights = [(score - highest).exp() for score in scores]
    return [weight / sum(weights) for weight in weights]


def kl(t: Iterable[Tensor], s: Iterable[Tensor]) -> Tensor:
    return sum(p * (p / q).log() for p, q in zip(t, s, strict=True))


def attention(q: Tensor, k: Tensor, scale: float, sees: Sees) -> list[list[list[Tensor]]]:
    """What head h of token i gives each token that i sees, [head][i], of one sample.

    Head h has key h // (H / h').
    """
    share, tokens = len(q) // len(k), range(q.shape[1])
    return [
        [
            softmax([scale * dot(q[h, i], k[h // share, j]) for j in tokens if sees(i, j)])
            for i in tokens
        ]
        for h in range(len(q))
    ]


def mean_over_heads(maps: list[list[list[Tensor]]]) -> list[list[list[Tensor]]]:
    rows = range(len(maps[0]))
    return [
        [
            [sum(column) / len(maps) for column in zip(*(m[i] for m in maps), strict=True)]
            for i in rows
        ]
    ]


def kl_of_maps(
    teacher: list[list[list[Tensor]]], student: list[list[list[Tensor]]]
) -> list[Tensor]:
    """Of one sample: for each token the mean over the maps."""
    return [
        sum(kl(t[i], s[i]) for t, s in zip(teacher, student, strict=True)) / len(teacher)
        for i in range(len(teacher[0]))
    ]


def relations(vectors: Tensor, parts: int) -> list[list[list[Tensor]]]:
    """Of one sample [h, t, d], [part][i]: MiniLMv2's eq. 6."""
    heads, tokens, width = vectors.shape
    joined = [torch.cat([vectors[h, i] for h in range(heads)]) for i in range(tokens)]
    size = heads * width // parts
    cut = [[row[a * size : (a + 1) * size] for row in joined] for a in range(parts)]
    return [[softmax([dot(x, y) / size**0.5 for y in part]) for x in part] for part in cut]


def projected_relations(vectors: Tensor, matrix: Tensor) -> list[list[list[Tensor]]]:
    """Of one sample [t, D] by a matrix [D, d], in one part: products of x P, over the root of D."""
    narrow = [torch.stack([dot(x, column) for column in matrix.T]) for x in vectors]
    return [[softmax([dot(x, y) / len(matrix) ** 0.5 for y in narrow]) for x in narrow]]


def cosines_off(vectors: Tensor, matrix: Tensor) -> float:
    """Root of the mean over pairs of (cos(x P, y P) - cos(x, y))^2; 0 without a pair."""
    narrow = [torch.stack([dot(x, column) for column in matrix.T]) for x in vectors]
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i)]
    off = [float(cosine(narrow[i], narrow[j]) - cosine(vectors[i], vectors[j])) for i, j in pairs]
    return (sum(gap**2 for gap in off) / len(off)) ** 0.5 if off else 0.0


def huber(x: Tensor, y: Tensor) -> Tensor:
    gap = abs(x - y)
    return gap**2 / 2 if float(gap.detach()) <= 1 else gap - 0.5


def distances(vectors: Tensor) -> dict[tuple[int, int], Tensor]:
    """Of ordered pairs, over their mean; all 0 where all vectors are equal."""
    pairs = list(permutations(range(len(vectors)), 2))
    apart = {(i, j): length(vectors[i] - vectors[j]) for i, j in pairs}
    mean = sum(apart.values()) / max(len(pairs), 1)
    return {
        pair: d / mean if pairs and float(mean.detach()) > 0 else d * 0 for pair, d in apart.items()
    }


def rkd_distance(teacher: Tensor, student: Tensor) -> Tensor:
    t, s = distances(teacher), distances(student)
    return sum((huber(s[pair], t[pair]) for pair in t), start=student.new_zeros(()))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """0 where a vector is 0."""
    both = length(a) * length(b)
    return dot(a, b) / both if float(both.detach()) > 0 else both.detach() * 0


def rkd_angle(teacher: Tensor, student: Tensor) -> Tensor:
    """Over ordered triples of which the teacher has an angle."""
    total = student.new_zeros(())
    for i, j, k in permutations(range(len(teacher)), 3):
        arms = [teacher[i] - teacher[j], teacher[k] - teacher[j]]
        if all(float(length(arm)) > 0 for arm in arms):
            found = cosine(student[i] - student[j], student[k] - student[j])
            total = total + huber(found, cosine(*arms))
    return total


def similarity(teacher: Tensor, student: Tensor) -> Tensor:
    if len(teacher) < 2:
        return student.new_zeros(())
    total = student.new_zeros(())
    for i in range(len(teacher)):
        rows = [torch.stack([dot(x[i], y) for y in x]) for x in (student, teacher)]
        sizes = [length(row) for row in rows]
        unit = [
            r / n if float(n.detach()) > 0 else r.detach() * 0
            for r, n in zip(rows, sizes, strict=True)
        ]
        total = total + sum((a - b) ** 2 for a, b in zip(*unit, strict=True))
    return total


def infonce(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    total = student.new_zeros(())
    for i in range(len(teacher)):
        scores = [cosine(student[i], t) / temperature for t in teacher]
        total = total - softmax(scores)[i].log()
    return total


def embedding_mse(teacher: Tensor, student: Tensor, ids: Sequence[int], weight: Tensor) -> Tensor:
    """[N], weight [D, D']."""
    found = []
    for n in ids:
        mapped = [dot(row, student[n]) for row in weight]
        found.append(
            sum((m - t) ** 2 for m, t in zip(mapped, teacher[n], strict=True)) / len(mapped)
        )
    return torch.stack(found)
