"""Evaluation protocols on frozen features.

A new protocol is a file and a line here; its settings are a section of `add_eval` in
`configs/common.py`, its columns a line in `table`. The shortest one to read is `classifier`.
"""

from itertools import chain

from maect_jax.evals.classifier import Classifier
from maect_jax.evals.cluster import Cluster
from maect_jax.evals.knn import KNN, Retrieval
from maect_jax.evals.lowshot import LowShot
from maect_jax.evals.near import Near
from maect_jax.evals.probe import AugmentedProbe, Probe

# What a name in `config.eval.protocols` asks for, and what runs by itself where it applies.
ON_REQUEST = {
    group[0].name: group
    for group in ((KNN(),), (Probe(),), (AugmentedProbe(),), (LowShot(),), (Cluster(), Near()))
}
AUTOMATIC = (Retrieval(), Classifier())
PROTOCOLS = {p.name: p for p in chain(AUTOMATIC, *ON_REQUEST.values())}
