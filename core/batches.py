"""The contract of a batch between data and training, independent of the form of a host's inputs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """The rows of one forward pass on one rank.

    Attributes:
        document_ids: ``[B]`` int64: which document a row is part of. Where state is carried from one batch to the next,
            a row whose id changes starts anew.
        problems: sentences on what could not be read for this batch, and was replaced or left empty.
        positions: an upper bound of the positions of a row, as blocks see them.
    """

    @property
    def document_ids(self) -> Tensor: ...

    @property
    def problems(self) -> tuple[str, ...]: ...

    @property
    def positions(self) -> int: ...

    def inputs(self, device: torch.device) -> Any:
        """The inputs of ``HostLosses``, on ``device``."""
        ...
