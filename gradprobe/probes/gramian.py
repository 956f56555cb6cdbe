"""Inner products of task gradients, collected parameter by parameter and summed layer by layer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.shared_layers import Layer

__all__ = ["GramianSum"]


# Numbers converted to float64 at a time: they stay in the cache, and no whole copy is made. Above 10,000 numbers
# numpy's OpenBLAS takes threads of its own, which spin on after their work: that cost as much as a whole training step.
# A matrix product is quicker than single ones from about eight gradients on.
_PIECE, _MANY = 1 << 13, 8
# Numbers of all tasks in float64 at a time where gradients are multiplied on a GPU: 64 MiB.
_COPIED = 1 << 23
# Of long float32 gradients, products of 256 numbers at a time are summed in float32, which is three times as quick, and
# these sums in float64: rounding errors are independent from sum to sum and average out, to below 3e-8 of the norms.
# Numbers so small or large that float32 would not hold their squares are multiplied in float64 all the same.
_LONG, _RUN, _TINY = 1 << 15, 256, 1e-28


def products(gradients: Sequence[Tensor]) -> Tensor:
    """Inner products of every two of k tensors of one shape and any floating type, accumulated in float64.

    Of long float32 tensors on a CPU, runs of 256 numbers are summed in float32 first: right to 3e-8 of the norms.

    A sparse tensor counts with its zeros; a complex one as twice as many real numbers, so that the product is the
    real part of the Hermitian one: that by which a step along one gradient changes the other's loss.

    Returns:
        (k, k), float64 (float32 on Apple's MPS, which has no float64), on the tensors' device.
    """
    flat = [vector(g) for g in gradients]
    kind = flat[0].device.type
    if kind == "cpu":
        return torch.from_numpy(_on_cpu(flat))
    if kind == "mps":
        return symmetric([[torch.dot(a.float(), b.float()) for b in flat[i:]] for i, a in enumerate(flat)])
    # A wide product costs a GPU more than its accumulation does.
    wide = [g if g.dtype == torch.float64 else g.float() for g in flat]
    if len(wide) >= _MANY:  # as many operations as pairs would cost more than the numbers
        return _by_matrix_there(wide)
    return symmetric([[(a * b).sum(dtype=torch.float64) for b in wide[i:]] for i, a in enumerate(wide)])


def vector(gradient: Tensor) -> Tensor:
    """A gradient as one dense real vector: a view where it can be."""
    gradient = gradient.detach()
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    return gradient.resolve_neg().reshape(-1)


def _on_cpu(flat: Sequence[Tensor]) -> Array:
    """By numpy, whose calls cost a tenth of torch's: most parameters are small."""
    arrays = [(g if g.dtype in (torch.float32, torch.float64) else g.float()).numpy() for g in flat]
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is seen in the result
        return _by_matrix(arrays) if len(arrays) >= _MANY else _one_by_one(arrays)


def _one_by_one(arrays: Sequence[NDArray[Any]]) -> Array:
    count, size = len(arrays), arrays[0].size
    if size >= _LONG and all(a.dtype == np.float32 for a in arrays):
        found = _in_runs(arrays)
        if found is not None:
            return found
    total = np.zeros((count, count))
    for start in range(0, size, _PIECE):
        wide = [(a if size <= _PIECE else a[start : start + _PIECE]).astype(np.float64, copy=False) for a in arrays]
        for i, first in enumerate(wide):
            for j in range(i, count):
                total[i, j] += first.dot(wide[j])
    return _mirrored(total)


def _in_runs(arrays: Sequence[NDArray[Any]]) -> Array | None:
    """Float32 within runs, float64 over them; None where float32 is too narrow for the numbers."""
    count, whole = len(arrays), arrays[0].size // _RUN * _RUN
    rest = [a[whole:].astype(np.float64) for a in arrays]
    runs = [a[:whole].reshape(-1, _RUN) for a in arrays]
    total = np.zeros((count, count))
    for i in range(count):
        for j in range(i, count):
            total[i, j] = _row_by_row(runs[i], runs[j]).sum(dtype=np.float64) + rest[i].dot(rest[j])
    mean = np.diagonal(total) / arrays[0].size
    fits = np.isfinite(total[np.triu_indices(count)]).all() and (mean > _TINY).all()
    return _mirrored(total) if fits else None


def _row_by_row(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """(n,) inner products of the rows: short ones, for which BLAS wakes no threads."""
    # numpy 2's own is half as quick again.
    rows: NDArray[Any] = np.vecdot(a, b) if hasattr(np, "vecdot") else np.einsum("ij,ij->i", a, b)
    return rows


def _mirrored(total: Array) -> Array:
    for i in range(1, len(total)):  # quicker than numpy's lists of indices, which cost more than the products
        total[i, :i] = total[:i, i]
    return total


def _by_matrix(arrays: Sequence[NDArray[Any]]) -> Array:
    """By torch, whose threads are those that train."""
    total = torch.zeros((len(arrays), len(arrays)), dtype=torch.float64)
    for start in range(0, arrays[0].size, _PIECE):
        block = torch.from_numpy(np.array([a[start : start + _PIECE] for a in arrays], dtype=np.float64))
        total += block @ block.T
    return total.numpy()


def _by_matrix_there(wide: Sequence[Tensor]) -> Tensor:
    """On the gradients' own device, so many numbers at a time that their float64 copies stay small."""
    count, size = len(wide), wide[0].numel()
    total = wide[0].new_zeros((count, count), dtype=torch.float64)
    piece = max(1, _COPIED // count)
    for start in range(0, size, piece):
        block = torch.stack([g[start : start + piece] for g in wide]).double()
        total += block @ block.T
    return total


def symmetric(upper: Sequence[Sequence[Tensor]]) -> Tensor:
    """The matrix whose upper triangle is given row by row; made where the numbers are, without a copy to there."""
    flat = torch.stack([value for row in upper for value in row])
    row, column = torch.triu_indices(len(upper), len(upper), device=flat.device)
    full = flat.new_zeros((len(upper), len(upper)))
    full[row, column] = flat
    full[column, row] = flat
    return full


class GramianSum:
    """Takes task gradients one parameter at a time, in any order, and gives the Gramian of every layer.

    Only products are kept, so a gradient can be freed as soon as it was added. Nothing is moved off the device
    before :meth:`result`, and then everything in one transfer per device.

    Args:
        layers: L of them.
        tasks: T, how many.

    Attributes:
        present: (L, T): which task brought a gradient to which layer.
    """

    def __init__(self, layers: Sequence[Layer], tasks: int) -> None:
        self._layers, self._tasks = layers, tasks
        self._owner = [index for index, layer in enumerate(layers) for _ in layer.parameters]
        self._parts: list[tuple[int, list[int], Tensor]] = []  # on other devices
        self._done: list[tuple[int, list[int], Array]] = []  # those that never were on another device
        self.present: NDArray[np.bool_] = np.zeros((len(layers), tasks), dtype=bool)

    def add(self, index: int, gradients: Sequence[Tensor | None], *, factor: float = 1.0) -> None:
        """Add one parameter.

        Args:
            index: Its place in ``SharedLayers.parameters``.
            gradients: T tensors of its shape; None where a task has no path to it.
            factor: Of the products.
        """
        there = [task for task, g in enumerate(gradients) if g is not None]
        if not there:
            return
        layer = self._owner[index]
        self.present[layer, there] = True
        present = [g for g in gradients if g is not None]
        if present[0].is_cpu:
            found = _on_cpu([vector(g) for g in present])
            self._done.append((layer, there, found if factor == 1.0 else found * factor))
        else:
            part = products(present) if factor == 1.0 else products(present) * factor
            self._parts.append((layer, there, part))

    def result(self, change: Array | None = None) -> Array:
        """The Gramians so far.

        Args:
            change: (T, T); the Gramians wanted are those of ``change @ gradients``.

        Returns:
            (L, T, T) float64, symmetric, in (loss per unit of parameter)^2. NaN where a task brought no gradient to any
            parameter of the layer; infinite where it brought one that is not finite.
        """
        bring([self])
        gram = self._summed(self._done, change)
        gram[~np.isfinite(gram)] = np.inf
        gram[~(self.present[:, :, None] & self.present[:, None, :])] = np.nan
        return gram

    def _summed(self, blocks: Iterable[tuple[int, list[int], Array]], change: Array | None) -> Array:
        gram = np.zeros((len(self._layers), self._tasks, self._tasks))
        partial = []
        with np.errstate(invalid="ignore", over="ignore"):  # as above
            for layer, there, block in blocks:
                if len(there) == self._tasks:
                    gram[layer] += block
                else:
                    partial.append((layer, np.ix_(there, there), block))
            if change is not None:
                gram = change @ gram @ change.T
            for layer, place, block in partial:
                gram[layer][place] += block if change is None else change[place] @ block @ change[place].T
        return gram

    @property
    def waiting(self) -> list[Tensor]:
        """Products that are still on another device."""
        return [part for _, _, part in self._parts]

    def arrived(self, values: Sequence[Array]) -> None:
        """The numbers of :attr:`waiting`."""
        for (layer, there, part), numbers in zip(self._parts, values, strict=True):
            self._done.append((layer, there, numbers.reshape(tuple(part.shape))))
        self._parts = []


def bring(sums: Sequence[GramianSum]) -> None:
    """Bring what is on other devices over, of several sums in one transfer."""
    waiting = [total.waiting for total in sums]
    found = iter(fetch([part for parts in waiting for part in parts]))
    for total, parts in zip(sums, waiting, strict=True):
        total.arrived([next(found) for _ in parts])


# Each transfer from a device makes the host wait for all that was asked of the device before. So a measured row has
# one: the products of its gradients, and along with them whatever else it stores, as the losses and the loss scale.


class _Waiting(threading.local):
    """Tensors that are to go along with the next transfer of this thread, and their numbers once they have."""

    def __init__(self) -> None:
        self.tensors: list[weakref.ref[Tensor]] = []
        self.found: dict[int, Array] = {}


_waiting = _Waiting()


def take_along(tensors: Sequence[Tensor]) -> None:
    """Have the next transfer bring these, too, in the place of what waits already. They are not kept alive."""
    _waiting.tensors, _waiting.found = [weakref.ref(t) for t in tensors if not t.is_cpu], {}


def fetch(tensors: Sequence[Tensor]) -> list[Array]:
    """The numbers of some tensors, flat, in float64 (from float32 on Apple's MPS, which has no float64).

    One transfer per device; nothing is copied of what lies on the CPU.
    """
    found: list[Array] = [np.zeros(0)] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.is_cpu:
            found[place] = tensor.detach().reshape(-1).double().numpy()
        else:
            by_device.setdefault(tensor.device, []).append(place)
    for device, places in by_device.items():
        others = _along(device)
        numbers = _bring([tensors[place] for place in places] + others)
        for place, part in zip(places, numbers, strict=False):
            found[place] = part
        _waiting.found.update(zip(map(id, others), numbers[len(places) :], strict=True))
    return found


def scalars(tensors: Sequence[Tensor]) -> list[float]:
    """Scalars as numbers: those that went along with a transfer, and the others by one of their own."""
    missing = [t for t in tensors if not (id(t) in _waiting.found and any(ref() is t for ref in _waiting.tensors))]
    fetched = dict(zip(map(id, missing), fetch(missing), strict=True))
    return [float((fetched[id(t)] if id(t) in fetched else _waiting.found[id(t)])[0]) for t in tensors]


def _along(device: torch.device) -> list[Tensor]:
    alive = [tensor for ref in _waiting.tensors if (tensor := ref()) is not None]
    return [t for t in alive if t.device == device and id(t) not in _waiting.found]


def _bring(tensors: Sequence[Tensor]) -> list[Array]:
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    flat = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])
    numbers = flat.cpu().double().numpy()
    return np.split(numbers, np.cumsum([tensor.numel() for tensor in tensors])[:-1])


class LossScale:
    """What a ``GradScaler`` does to losses, which are measured scaled and stored unscaled; nothing without one.

    Args:
        scaler: The loop's own. It is asked for its scale and told nothing.

    Raises:
        ProbeError: It has no scale.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not (hasattr(scaler, "scale") and hasattr(scaler, "get_scale")):
            raise ProbeError(f"scaler= is a {type(scaler).__name__}; pass the loop's torch.amp.GradScaler, or none.")
        self._scaler = scaler
        self.unread: list[Tensor] = []
        """The factor of the losses that were last scaled together, where it is a tensor that nobody has read yet."""

    def apply(self, loss: Tensor) -> Tensor:
        """The loss as its backward is to be made."""
        if self._scaler is None:
            return loss
        self.unread = []
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def all(self, losses: Sequence[Tensor], *, along: bool = False) -> list[Tensor]:
        """Several losses, scaled; their values come over with the next transfer where they are to go along."""
        scaled = [self.apply(loss) for loss in losses]
        if self._scaler is not None and losses:  # asked by get_scale() it would make the host wait
            self.unread = [self._scaler.scale(torch.ones((), device=losses[0].device))]
        if along:
            take_along([*losses, *self.unread])
        return scaled

    @property
    def factor(self) -> float:
        """By what losses are multiplied; right once one was."""
        if self._scaler is None:
            return 1.0
        return scalars(self.unread)[0] if self.unread else float(self._scaler.get_scale())

    @property
    def now(self) -> float:
        """By what the next loss would be multiplied. Asking makes the host wait for a GPU."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    @property
    def there(self) -> bool:
        """Whether losses are scaled, so that a gradient may overflow which is finite by itself."""
        return self._scaler is not None and self.factor != 1.0

    def off(self, gram: Array) -> Array:
        """Gramians of scaled gradients as those of unscaled ones."""
        return gram / self.factor**2
