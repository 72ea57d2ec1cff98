"""Recursive spectral bisection of large graphs: all parts of about the same size are cut in one round.

A part is cut at the middle of the vertices sorted by its Fiedler vector, the smoothest function on it that is not
constant (Pothen, Simon, Liou: Partitioning sparse matrices with eigenvectors of graphs, 1990; with the normalised
Laplacian of Shi and Malik: Normalized cuts and image segmentation, 2000). Computing it part by part costs a solver call
for every 16 vertices. Here a few smooth functions are kept for every vertex instead. When a part is cut they are good
first guesses for both halves, so one polynomial filter (Zhou, Saad, Tiago, Chelikowsky: Self-consistent-field
calculations using Chebyshev-filtered subspace iteration, 2006) and one small eigenproblem per part make them good
enough again, and both work on all parts at once.

Everything depends on the graph only: sums are taken in a fixed order, first guesses come from a breadth-first search
and a seeded generator, and ties go to the vertex that the search meets first.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph

_KEPT = 4  # functions kept for every vertex
_FRESH = 1  # random one added in every round: along a new direction, what is kept may be constant on a part
_GAIN = 6.0  # the filter amplifies what is smooth cosh(6) = 200 times
_LONGEST_FILTER = 40  # most multiplications by the graph in a round; large parts are cut less precisely
_WIDTH = 10.0  # on a mesh part of n vertices about four functions vary so slowly that 1 - eigenvalue < 10 / n

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


def bisection_order(graph: scipy.sparse.csr_matrix, leaf: int) -> _Ints:
    """Order the vertices so that every `leaf` consecutive ones are a compact part of the graph.

    Connected components are ordered one after the other, the largest first, then by their lowest vertex; so are the
    components of a part that is not connected. Halves are arranged so that they continue what is before the part.

    Args:
        graph: Symmetric, square, with sorted indices and no diagonal; the values do not count.
        leaf: Parts of so many vertices are not cut further; cuts are at multiples of it where components allow.

    Returns:
        The vertex at each position; vertices of one part ascending.
    """
    count = graph.shape[0]
    numbering = _search_order(graph)
    inverse = np.empty(count, np.int64)
    inverse[numbering] = np.arange(count)
    degrees = np.diff(graph.indptr)[numbering]
    # The pattern in the new numbering, with the diagonal, which the filter needs.
    pattern = scipy.sparse.csr_matrix(graph[numbering][:, numbering] + scipy.sparse.identity(count, format="csr"))
    pattern.sort_indices()
    rows = np.repeat(np.arange(count), degrees + 1)
    bisection = _Bisection(rows, pattern.indices.astype(np.int64), count, leaf)
    while bisection.cut_largest():
        pass
    return numbering[np.lexsort((numbering, bisection.begin))]


def _search_order(graph: scipy.sparse.csr_matrix) -> _Ints:
    """Breadth-first order of all components from a vertex at the rim of each (George and Liu 1979, two sweeps)."""
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    order = _breadth_first(graph, np.unique(label, return_index=True)[1])
    last = np.zeros(label.max(initial=-1) + 1, np.int64)
    last[label[order]] = order  # of several assignments the last one counts: the vertex that is farthest away
    return _breadth_first(graph, last)


def _breadth_first(graph: scipy.sparse.csr_matrix, roots: _Ints) -> _Ints:
    """Breadth-first order from one root per component: a search from an additional vertex that sees all roots."""
    count = graph.shape[0]
    indices = np.concatenate([graph.indices, roots])
    offsets = np.concatenate([graph.indptr, [len(indices)]])
    joined = scipy.sparse.csr_matrix((np.ones(len(indices)), indices, offsets), shape=(count + 1, count + 1))
    order = scipy.sparse.csgraph.breadth_first_order(joined, count, return_predecessors=False)
    return order[1:].astype(np.int64)


def _matrix(rows: _Ints, columns: _Ints, values: npt.NDArray, count: int) -> scipy.sparse.csr_matrix:
    """A square matrix from entries that are sorted by row."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
    return scipy.sparse.csr_matrix((values, columns, offsets), shape=(count, count))


class _Bisection:
    """The parts at some time.

    Attributes:
        begin: For every vertex the first position of its part, which names the part.
    """

    def __init__(self, rows: _Ints, columns: _Ints, count: int, leaf: int) -> None:
        self._count, self._leaf = count, leaf
        self._all_rows, self._all_columns = rows, columns
        self._rows, self._columns = rows, columns  # without edges between parts
        self._random = np.random.default_rng(0)
        self._functions = self._random.random((count, _KEPT)) - 0.5
        self._functions[:, 0] = np.arange(count) / max(count, 1)  # the distance from the start of the search, roughly
        self.begin = np.zeros(count, np.int64)
        self._separate_components()

    def cut_largest(self) -> bool:
        """Cut all parts that are at least half as large as the largest; False when there is nothing left to cut."""
        sizes = np.bincount(self.begin, minlength=1)
        largest = int(sizes.max())
        if largest <= self._leaf:
            return False
        parts = np.flatnonzero(sizes >= max(self._leaf + 1, largest / 2))
        number = np.full(len(sizes), -1)
        number[parts] = np.arange(len(parts))
        vertices = np.flatnonzero(number[self.begin] >= 0)
        part = number[self.begin[vertices]]
        local = np.full(self._count, -1)
        local[vertices] = np.arange(len(vertices))

        chosen = local[self._rows] >= 0
        rows, columns = local[self._rows[chosen]], local[self._columns[chosen]]
        functions = np.concatenate(
            [self._functions[vertices], self._random.random((len(vertices), _FRESH)) - 0.5], axis=1
        )
        functions = _smoothest(rows, columns, part, functions, largest)
        self._functions[vertices] = functions
        values = self._oriented(functions[:, 0], part, local)
        self._cut(vertices, part, values, parts, sizes[parts])
        self._separate_components()
        return True

    def _oriented(self, values: _Floats, part: _Ints, local: _Ints) -> _Floats:
        """`values` scaled to 1 and with the sign that makes the order continuous.

        The side that has more edges to what is before the part comes first; near neighbours in the order count more.
        Where that is even, the first vertex with a large value decides. Rounding lets vertices that symmetry makes
        equal keep their order.
        """
        count = int(part.max()) + 1
        scale = np.zeros(count)
        np.maximum.at(scale, part, np.abs(values))
        values = values / np.maximum(scale, np.finfo(np.float64).tiny)[part]
        large = np.flatnonzero(np.abs(values) > 0.5)[::-1]
        first = np.zeros(count, np.int64)
        first[part[large]] = large
        sign = np.where(values[first] < 0, -1.0, 1.0)
        distance = self.begin[self._all_columns] - self.begin[self._all_rows]
        outside = np.flatnonzero((distance != 0) & (local[self._all_rows] >= 0))
        inner = local[self._all_rows[outside]]
        weights = values[inner] * self._count / distance[outside]
        pull = np.round(np.bincount(part[inner], weights=weights, minlength=count), 6)
        sign = np.where(pull != 0, np.sign(pull), sign)
        return np.round(values * sign[part], 6)

    def _cut(self, vertices: _Ints, part: _Ints, values: _Floats, parts: _Ints, sizes: _Ints) -> None:
        """Give the vertices with the larger values of every part a part of their own."""
        order = np.argsort(4.0 * part + values, kind="stable")
        cut = _cut_positions(sizes, parts, self._leaf)
        place = np.arange(len(vertices)) - (np.cumsum(sizes) - sizes)[part[order]]
        second = order[place >= cut[part[order]]]
        self.begin[vertices[second]] += cut[part[second]]

    def _separate_components(self) -> None:
        """Make the components of parts that are to be cut further parts of their own, the largest first."""
        inside = self.begin[self._rows] == self.begin[self._columns]
        self._rows, self._columns = self._rows[inside], self._columns[inside]
        pattern = _matrix(self._rows, self._columns, np.ones(len(self._rows)), self._count)
        _, label = scipy.sparse.csgraph.connected_components(pattern, directed=False)
        of_part = np.bincount(self.begin, minlength=1)[self.begin]
        of_component = np.bincount(label, minlength=1)[label]
        members = np.flatnonzero((of_part > self._leaf) & (of_part > of_component))
        if len(members) == 0:
            return
        order = members[np.lexsort((label[members], -of_component[members], self.begin[members]))]
        begin = self.begin[order]
        new_part = np.concatenate([[True], begin[1:] != begin[:-1]])
        new_component = new_part | np.concatenate([[True], label[order[1:]] != label[order[:-1]]])
        place = np.arange(len(order))
        place -= np.maximum.accumulate(np.where(new_part, place, 0))
        start = np.maximum.accumulate(np.where(new_component, begin + place, 0))
        self.begin[order] = start


def _cut_positions(sizes: _Ints, begins: _Ints, leaf: int) -> _Ints:
    """Cut near the middle so that the second half begins at a multiple of one or, in large parts, two leaves."""
    unit = np.where(sizes < 4 * leaf, leaf, 2 * leaf)
    cut = np.round((begins + sizes / 2) / unit).astype(np.int64) * unit - begins
    cut = np.where(cut <= 0, cut + unit, cut)
    return np.where(cut >= sizes, cut - unit, cut)


def _smoothest(rows: _Ints, columns: _Ints, part: _Ints, functions: _Floats, largest: int) -> _Floats:
    """The `_KEPT` smoothest combinations [N, _KEPT] of filtered functions on every part, the smoothest first.

    Args:
        rows, columns: Edges inside parts, both directions and the diagonal, sorted by row.
        part: [N], the part of each vertex; all of them are connected.
        functions: [N, K].
        largest: Vertices of the largest part.
    """
    count = len(part)
    degrees = (np.bincount(rows, minlength=count) - 1).astype(np.float64)
    weights = np.bincount(part, weights=degrees)

    def centred(functions: _Floats) -> _Floats:
        means = [np.bincount(part, weights=degrees * column) / weights for column in functions.T]
        return functions - np.stack(means, axis=1)[part]

    # Averages over the neighbours have eigenvalues from -1 to 1. `steps` Chebyshev polynomials of
    # scale * average + shift keep those below 1 - width between -1 and 1 and raise 1 to cosh(_GAIN).
    width = min(max(_WIDTH / largest, 0.5 * (_GAIN / _LONGEST_FILTER) ** 2), 0.5)
    scale, shift = 2 / (2 - width), width / (2 - width)
    steps = math.ceil(_GAIN / math.acosh(scale + shift))
    values = np.where(rows == columns, 2 * shift, (2 * scale / degrees)[rows])
    double = _matrix(rows, columns, values, count)
    before = centred(functions)
    now = 0.5 * (double @ before)
    for _ in range(steps - 1):
        after = double @ now
        after -= before
        now, before = after, now
    functions = centred(now)
    return _ritz(functions, double @ functions, degrees, part)


def _ritz(functions: _Floats, images: _Floats, weights: _Floats, part: _Ints) -> _Floats:
    """Rayleigh-Ritz: the combinations [N, _KEPT] of functions [N, K] with the largest eigenvalues on every part."""
    width = functions.shape[1]
    functions, images = (np.ascontiguousarray(array.T) for array in (functions, images))
    parts = int(part.max()) + 1
    gram = np.empty((parts, width, width))
    energy = np.empty((parts, width, width))
    for i in range(width):
        weighted = weights * functions[i]
        for j in range(i + 1):
            gram[:, i, j] = gram[:, j, i] = np.bincount(part, weights=weighted * functions[j])
            energy[:, i, j] = energy[:, j, i] = np.bincount(part, weights=weighted * images[j])
    norms = np.sqrt(np.maximum(np.diagonal(gram, axis1=1, axis2=2), np.finfo(np.float64).tiny))
    scales = norms[:, :, None] * norms[:, None, :]
    # The ridge keeps functions that depend on each other from being divided by zero; they get the eigenvalue 0.
    inverse = np.linalg.inv(np.linalg.cholesky(gram / scales + 1e-10 * np.eye(width)))
    transposed = inverse.transpose(0, 2, 1)
    # Where eigenvalues are equal, as on stars, rounding would choose among the functions: rather prefer the first ones.
    preference = 1e-8 * np.diag(np.arange(width, 0, -1))
    vectors = np.linalg.eigh(inverse @ (energy / scales) @ transposed + preference)[1][:, :, ::-1][:, :, :_KEPT]
    combinations = (transposed @ vectors) / norms[:, :, None]
    result = np.zeros((len(part), _KEPT))
    for i in range(width):
        result += functions[i][:, None] * combinations[part, i]
    return result
