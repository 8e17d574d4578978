"""Rows of an evaluation, of features that are at hand."""

from maect_jax import config as configs
from maect_jax.evals.base import Row
from maect_jax.run.folder import Run
from tests.helpers import CONFIGS


def row_of(features, mesh, *overrides, images=None, classifier=None) -> Row:
    """A row with features by split, and the quickstart's tiny config with these overrides."""
    config = configs.load(str(CONFIGS / "quickstart.py:test"), overrides)
    return Row(
        run=Run(config, None, mesh, None),
        name="row",
        made_of={},
        features=features,
        images=images or features,
        bad_images={},
        encode=None,
        classifier=classifier,
    )
