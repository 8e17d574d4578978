"""Evaluation protocols on frozen features.

A new protocol is a file and a line here; its settings are a section of `add_eval` in
`configs/common.py`, its columns a line in `table`. The shortest one to read is `classifier`.
"""

from maect_jax.evals.classifier import Classifier
from maect_jax.evals.cluster import Cluster
from maect_jax.evals.knn import KNN, Retrieval
from maect_jax.evals.lowshot import LowShot
from maect_jax.evals.near import Near
from maect_jax.evals.probe import AugmentedProbe, Probe

# Those that `config.eval.protocols` names, those that run with one of them, and those that run by
# themselves where they apply.
ON_REQUEST = {p.name: p for p in (KNN(), Probe(), AugmentedProbe(), LowShot(), Cluster())}
WITH_OTHERS = {p.name: p for p in (Near(),)}
AUTOMATIC = {p.name: p for p in (Retrieval(), Classifier())}
PROTOCOLS = AUTOMATIC | ON_REQUEST | WITH_OTHERS
