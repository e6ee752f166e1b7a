# SPDX-License-Identifier: MIT
"""Predictors of the experts that the next layers will want: native ones by name, and versions in Python.

A predictor that is given as ``prefetch=`` sees every routing and names experts to prefetch. The library
decides how many layers ahead it asks, and which predictions it follows, by how good they were, by the disk's
speed and by the time of a layer. `NAMES` are the predictors of the library (native/src/prefetch/predictors);
`REFERENCES` has a class for each that predicts the same, call by call. Anything with the methods of
`PrefetchPolicy` can be given instead of a name; it is called from the thread that computes, and Python makes
it slower.

The predictor "router" applies the next layers' routers early. It needs hidden states, which traces do not
have, so it works only with a model; in the simulator, `Router` stands in for it.
"""

from .mixed import Mixed
from .popular import Popular
from .predictor import Factory, PrefetchPolicy
from .previous import Previous
from .router import Router
from .similar import Similar
from .transition import Transition

ROUTER = "router"
REFERENCES: dict[str, Factory] = {
    "previous": Previous, "popular": Popular, "transition": Transition, "similar": Similar, "mixed": Mixed,
}  # fmt: skip
FROM_ROUTINGS = tuple(REFERENCES)
NAMES = (ROUTER, *FROM_ROUTINGS)

__all__ = [
    "FROM_ROUTINGS", "NAMES", "REFERENCES", "ROUTER", "Factory", "Mixed", "Popular", "PrefetchPolicy",
    "Previous", "Router", "Similar", "Transition",
]  # fmt: skip
