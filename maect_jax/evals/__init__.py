"""Evaluation protocols on frozen features. A new protocol is a file and a line here."""

from maect_jax.evals.classifier import Classifier
from maect_jax.evals.cluster import Cluster
from maect_jax.evals.knn import KNN
from maect_jax.evals.lowshot import LowShot
from maect_jax.evals.probe import AugmentedProbe, Probe
from maect_jax.evals.retrieval import Retrieval

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Retrieval(), Classifier(), KNN(), Probe(), AugmentedProbe(), LowShot(), Cluster()
    )
}  # fmt: skip
# Those that `config.eval.protocols` may name; the others run without being asked for.
ON_REQUEST = tuple(name for name, protocol in PROTOCOLS.items() if protocol.on_request)
