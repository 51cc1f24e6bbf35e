"""The contract of a batch: what training needs to know of data, whatever the host's inputs are."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """What one rank sees in one forward pass.

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
        """What ``HostLosses`` take, on ``device``."""
        ...
