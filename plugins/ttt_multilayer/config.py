"""Options of ``ttt_multilayer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moshi_ttt.plugins.hybrid.config import HybridConfig


class TTTMultilayerConfig(HybridConfig):
    """TTT-MLP of any depth: the fast network is an MLP of ``depth`` layers per head.

    Attributes:
        depth: layers of the fast network; 1 is TTT-Linear, 2 TTT-MLP. With ``hidden_dims``, one more than those.
        expansion: width of each hidden layer over head width; 4 when neither it nor ``hidden_dims`` is given.
        hidden_dims: the hidden layers' widths one by one, instead of ``expansion``.
    """

    variant: Literal["ttt_multilayer"] = "ttt_multilayer"
    base_lr: float = Field(default=0.1, gt=0.0)
    depth: int = Field(default=3, ge=1)
    expansion: int | None = Field(default=None, ge=1)
    hidden_dims: tuple[Annotated[int, Field(ge=1)], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _depth_follows_hidden_dims(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("hidden_dims"), Sequence):
            return {"depth": len(values["hidden_dims"]) + 1, **values}
        return values

    @model_validator(mode="after")
    def _widths_are_given_once(self) -> TTTMultilayerConfig:
        if self.hidden_dims is None:
            return self
        if self.expansion is not None:
            raise ValueError("give hidden_dims or expansion, not both")
        if self.depth != len(self.hidden_dims) + 1:
            raise ValueError(
                f"hidden_dims has {len(self.hidden_dims)} widths, which makes {len(self.hidden_dims) + 1} layers, and "
                f"depth says {self.depth}; leave depth out"
            )
        return self
