"""The cost model as a value: predicted times of passes and messages, with their errors, and its JSON form."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from resplit.cost.features import design
from resplit.cost.links import LinkModel
from resplit.errors import DataError
from resplit.types import BlockFeatures, FloatArray

__all__ = ["PHASES", "CostModel", "PassKey", "PassModel", "Phase", "PredictionError"]

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
PassKey = tuple[str | None, Phase, str | None]  # node (None: all nodes), phase, kind of block (None: all kinds)


@dataclass(frozen=True)
class PassModel:
    """Seconds of a pass over a block of one kind = `design` @ `coefficients`, with the standard errors `errors`.

    If `node` is None, the model is pooled over all nodes and in units of their `reference_s`; if `kind` is None, it is
    also pooled over the kinds. `cells` distinct passes were fitted; 0 if the model was derived from the pooled one.
    """

    node: str | None
    phase: Phase
    kind: str | None
    coefficients: tuple[float, ...]
    errors: tuple[float, ...]
    cells: int
    relative_error: float


@dataclass(frozen=True)
class PredictionError:
    """Absolute relative error of predictions for held-out passes; None if none were held out."""

    median: float | None
    p90: float | None
    cells: int

    @classmethod
    def of(cls, predicted: FloatArray, measured: FloatArray) -> PredictionError:
        """The error of `predicted` against `measured`, both (C,) in seconds."""
        if len(measured) == 0:
            return cls(None, None, 0)
        error = np.abs(predicted / measured - 1)
        return cls(float(np.median(error)), float(np.quantile(error, 0.9)), len(error))


@dataclass(frozen=True)
class CostModel:
    """The fitted times of passes on each node and of messages on each link.

    `fitted_at_s` is the time of the newest telemetry (seconds since 1970), `reference_s` each node's time for the
    reference layer. `held_out_contexts` and `held_out_nodes` are the errors on longer contexts, and on nodes of which
    only `reference_s` is known. `emulated` names the nodes that emulate hardware.
    """

    fitted_at_s: float
    reference_s: dict[str, float]
    passes: tuple[PassModel, ...]
    links: tuple[LinkModel, ...]
    held_out_contexts: PredictionError
    held_out_nodes: PredictionError
    emulated: tuple[str, ...] = ()

    @property
    def uncertainty(self) -> float:
        """The expected relative error for nodes with timings: the held-out median, or else that of the fit."""
        if self.held_out_contexts.median is not None:
            return self.held_out_contexts.median
        errors = [fit.relative_error for fit in self.passes if fit.node is not None and fit.cells > 0]
        return float(np.median(errors)) if errors else 0.0

    def find(self, node: str | None, phase: Phase, kind: str | None) -> PassModel | None:
        """The pass model of a node, phase and kind; None if there is none."""
        return self._passes_by_key.get((node, phase, kind))

    def pass_s(
        self, feature: BlockFeatures, node: str, phase: Phase, tokens: ArrayLike, context_tokens: ArrayLike
    ) -> FloatArray:
        """Predicted seconds (P,) of passes of `tokens` new tokens after `context_tokens` cached ones.

        NaN for an unknown node. DataError for a kind of block to which the model was not fitted.
        """
        if node not in self.reference_s:
            return np.full(np.broadcast(np.atleast_1d(tokens), context_tokens).shape, np.nan)
        fit = self.find(node, phase, feature.kind)
        if fit is None:
            raise DataError(
                f"the cost model was not fitted to blocks of kind {feature.kind!r}; profile this model first"
            )
        seconds: FloatArray = design(feature, tokens, context_tokens) @ np.array(fit.coefficients)
        return seconds

    def link(self, node: str, peer: str) -> LinkModel | None:
        """The model of messages from `node` to `peer`; None if no message was seen."""
        return self._links_by_key.get((node, peer))

    @cached_property
    def _passes_by_key(self) -> dict[PassKey, PassModel]:
        return {(fit.node, fit.phase, fit.kind): fit for fit in self.passes}

    @cached_property
    def _links_by_key(self) -> dict[tuple[str, str], LinkModel]:
        return {(link.node, link.peer): link for link in self.links}

    def to_json(self) -> str:
        """The model as JSON text for `from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Read the text that `to_json` wrote; DataError if it is not a cost model."""
        try:
            return cls.from_plain(json.loads(text))
        except ValueError as error:
            raise DataError(f"not a cost model: {error!r}") from error

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> CostModel:
        """The model from parsed JSON (Any: not checked yet); DataError if it is not a cost model."""
        try:
            return cls(
                **plain
                | {
                    "passes": tuple(
                        PassModel(**fit | {"coefficients": tuple(fit["coefficients"]), "errors": tuple(fit["errors"])})
                        for fit in plain["passes"]
                    ),
                    "links": tuple(LinkModel(**link) for link in plain["links"]),
                    "held_out_contexts": PredictionError(**plain["held_out_contexts"]),
                    "held_out_nodes": PredictionError(**plain["held_out_nodes"]),
                    "emulated": tuple(plain["emulated"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a cost model: {error!r}") from error
