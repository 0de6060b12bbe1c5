"""A tensor in; what was made of it out, made again only when the tensor has changed."""

from collections.abc import Callable

from torch import Tensor


class Kept:
    """One tensor that follows from another one, such as weights unpacked."""

    def __init__(self) -> None:
        self._made: tuple[tuple[int, int], Tensor] | None = None  # where it was made from, and what

    def of(self, tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave for the same numbers at the same place."""
        if tensor.is_inference():  # such tensors count no changes
            return make()
        state = (tensor.data_ptr(), tensor._version)
        if self._made is None or self._made[0] != state:
            self._made = (state, make())
        return self._made[1]

    @property
    def nbytes(self) -> int:
        """Of what is kept at the moment."""
        return self._made[1].nbytes if self._made else 0
