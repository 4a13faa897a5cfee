"""Converts pass times to the node times of the placement problem (docs/adr/0003-cost-model.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resplit.cost.features import COLUMNS, design
from resplit.cost.model import CostModel, Phase
from resplit.errors import DataError
from resplit.types import BlockFeatures, FloatArray, RequestClass

__all__ = ["NodeTimes", "node_times"]

# Relative weight of the true decode step, which decides if the classes do not determine both numbers.
REGULARISATION = 1e-6
# A request always adds something to the load; the problem format requires a value above 0.
LEAST_LOAD_SHARE = 1e-3


@dataclass(frozen=True, eq=False)
class NodeTimes:
    """`prefill_s_per_token` P and `decode_s_per_token` D, both (J, N) and at least 0, and `load_share` (N,).

    P and D are NaN for an unknown node, whose load share is 1.
    """

    prefill_s_per_token: FloatArray
    decode_s_per_token: FloatArray
    load_share: FloatArray


def node_times(
    model: CostModel,
    features: Sequence[BlockFeatures],
    nodes: Sequence[str],
    classes: Sequence[RequestClass],
    stages: int = 1,
) -> NodeTimes:
    """The node times of the requests of `classes` on a chain of about `stages` nodes.

    A request of class r makes one prefill pass over its p_r tokens and g_r - 1 decode passes, at a mean context of
    p_r + g_r / 2. P and D are chosen so that p_r P + g_r D is the time of these passes: exactly for one class,
    otherwise with the least squared relative error, weighted by rate.

    A decode pass over n sessions takes F + m n. A request loads the node by its prefill pass and by m for each decode
    pass, if F is spent once for all sessions. The load share is this load over the time of the passes, both summed
    over all blocks and over the classes by rate. On a chain, it is higher by what too few sessions share.
    """
    prompt = np.array([c.prompt_tokens for c in classes])
    new = np.array([c.new_tokens for c in classes])
    rate = np.array([c.rate_rps for c in classes])
    rate = rate if rate.sum() > 0 else np.ones_like(rate)
    context, one = prompt + new / 2, np.ones_like(new)
    prefill_pass = _pass_s(model, features, nodes, "prefill", prompt, np.zeros_like(prompt), one)  # (R, J, N)
    step = _pass_s(model, features, nodes, "decode", one, context, one)  # F + m (R, J, N)
    more = _pass_s(model, features, nodes, "decode", 2 * one, context, 2 * one) - step  # m (R, J, N)
    steps = (new - 1)[:, None, None]
    request = prefill_pass + steps * step
    share = rate * new / np.sum(rate * new)
    prefill, decode = _least_squares(prompt, new, rate, request, np.tensordot(share, step, 1))
    least = _least_load_share(rate, prefill_pass + steps * more, request)
    load = np.tensordot([c.rate_rps for c in classes], request.sum(axis=1), 1) / stages  # (N,)
    return NodeTimes(prefill, decode, least if stages == 1 else _load_share_on_chain(least, load))


def _least_load_share(rate: FloatArray, load_s: FloatArray, request_s: FloatArray) -> FloatArray:
    """The load of requests over their time (N,), from both by class, block and node (R, J, N).

    All sessions share every pass.
    """
    load, time = (np.tensordot(rate, seconds.sum(axis=1), 1) for seconds in (load_s, request_s))  # (N,)
    share: FloatArray = np.divide(load, time, out=np.ones_like(time), where=time > 0)
    return np.clip(share, LEAST_LOAD_SHARE, 1.0)


def _load_share_on_chain(least: FloatArray, load: FloatArray) -> FloatArray:
    """The load share rho (N,) where sessions are spread over the stages of a chain, so that few of them meet.

    A session finds n - 1 others at its stage. By Little's law n = 1 + a / (1 - rho a), where `load` a is the node time
    of the requests of a second. It waits for the half of the pass under way that is left on average, and they share
    that: rho = least + (1 - least) / 2 n. Both together are a quadratic equation of n.
    """
    free, alone = 1 - least * load, load * (1 - least)
    half = 0.5 + 0.75 * alone
    with np.errstate(divide="ignore", invalid="ignore"):
        sessions = (half + np.sqrt(half**2 - free * alone / 2)) / free
    return np.where(free > 0, least + (1 - least) / (2 * sessions), least)


def _pass_s(
    model: CostModel,
    features: Sequence[BlockFeatures],
    nodes: Sequence[str],
    phase: Phase,
    tokens: FloatArray,
    context_tokens: FloatArray,
    sessions: FloatArray,
) -> FloatArray:
    """Predicted times (R, J, N) of one pass of each class."""
    coefficients = {kind: _coefficients(model, nodes, phase, kind) for kind in {feature.kind for feature in features}}
    times = [design(feature, tokens, context_tokens, sessions) @ coefficients[feature.kind].T for feature in features]
    return np.stack(times, axis=1)


def _coefficients(model: CostModel, nodes: Sequence[str], phase: Phase, kind: str) -> FloatArray:
    """The coefficients (N, F); NaN for unknown nodes."""
    if model.find(None, phase, kind) is None:
        raise DataError(f"the cost model was not fitted to blocks of kind {kind!r}; profile this model first")
    fits = [model.find(node, phase, kind) for node in nodes]
    return np.array([fit.coefficients if fit else (np.nan,) * len(COLUMNS) for fit in fits])


def _least_squares(
    prompt: FloatArray, new: FloatArray, rate: FloatArray, request_s: FloatArray, step_s: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """P, D (J, N) that minimise sum_r w_r (p_r P + g_r D - S_r)^2 with w_r = rate_r / S_r^2, P >= 0 and D >= 0.

    The normal equations of the two unknowns are solved. If one unknown is negative, it is set to 0 and the other is
    fitted alone. S is `request_s` (R, J, N); `step_s` (J, N) is the decode step towards which D is regularised.
    """
    weight = rate[:, None, None] / np.maximum(request_s, 1e-12) ** 2
    p, g = prompt[:, None, None], new[:, None, None]
    pp, pg, gg = (weight * p * p).sum(axis=0), (weight * p * g).sum(axis=0), (weight * g * g).sum(axis=0)
    ps, gs = (weight * p * request_s).sum(axis=0), (weight * g * request_s).sum(axis=0)
    regular_gg, regular_gs = gg * (1 + REGULARISATION), gs + REGULARISATION * gg * step_s
    determinant = pp * regular_gg - pg**2
    prefill = (ps * regular_gg - regular_gs * pg) / determinant
    decode = (regular_gs * pp - ps * pg) / determinant
    only_decode, only_prefill = prefill < 0, decode < 0
    return (
        np.where(only_prefill, ps / pp, np.where(only_decode, 0.0, prefill)),
        np.where(only_decode, gs / gg, np.where(only_prefill, 0.0, decode)),
    )
