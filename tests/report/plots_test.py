"""Single figures of numbers and of images."""

import numpy as np

from maect_jax.report import plots, sheets


def test_confusion_counts_clusters_by_row_and_labels_by_column():
    labels, clusters = np.array([2, 2, 5, 5, 5]), np.array([0, 1, 1, 1, 1])
    axes = plots.confusion(labels, clusters, list("abcdef")).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "1", (0, 1): "1", (1, 1): "3"}  # (label, cluster)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["c", "f"]


def test_curves_draw_what_is_logged():
    history = [
        {"stage": "head", "step": 1, "loss": 3.0, "nn_accuracy": 0.1},
        {"stage": "mae", "step": 1, "loss": 1.0},
        {"stage": "head", "step": 9, "loss": 2.0, "nn_accuracy": 0.5},
        {"stage": "mae", "step": 2, "loss": None},
    ]
    found = plots.by_stage(history, "loss")
    (panel,) = plots.curves(found, "loss", {}).axes
    assert panel.get_title() == "head"
    np.testing.assert_array_equal(panel.lines[0].get_xydata(), [[1, 3.0], [9, 2.0]])
    assert plots.single_points(found) == {("mae", 1): {"": 1.0}}
    assert len(plots.curves(plots.by_stage(history, "nn_accuracy"), "", {}).axes) == 1
    assert plots.curves(plots.by_stage(history, "absent"), "", {}) is None


def test_curves_of_several_runs_share_a_panel():
    history = [
        {"run": run, "stage": stage, "step": step, "loss": float(step)}
        for run, stage, steps in (("a", "mae", 3), ("b", "mae", 1), ("a", "ct", 1), ("b", "ct", 1))
        for step in range(1, steps + 1)
    ]
    found = plots.by_stage(history, "loss")
    (panel,) = plots.curves(found, "loss", {"a": "#ff0000", "b": "#0000ff"}).axes
    assert [line.get_color() for line in panel.lines] == ["#ff0000", "#0000ff"]
    assert [len(line.get_xdata()) for line in panel.lines] == [3, 1]
    assert plots.single_points(found) == {("ct", 1): {"a": 1.0, "b": 1.0}}


def test_a_long_curve_has_its_running_mean():
    history = [{"stage": "mae", "step": step, "loss": step % 2} for step in range(1, 41)]
    curve, mean = plots.curves(plots.by_stage(history, "loss"), "loss", {}).axes[0].lines
    assert len(curve.get_xdata()) == 40
    np.testing.assert_array_equal(mean.get_xdata(), np.arange(1.5, 40))
    np.testing.assert_array_equal(mean.get_ydata(), np.full(39, 0.5))


def test_blocks_are_in_order_and_end_with_the_final_features():
    found = {"k-NN": {"mae": {"final": 5.0, "10": 7.0, "9": 6.0}, "ct": {"0": 8.0}}}
    (panel,) = plots.blocks(found, depth=12).axes
    mae, final, ct = panel.lines
    np.testing.assert_array_equal(mae.get_xydata(), [[9, 6], [10, 7]])
    np.testing.assert_array_equal(final.get_xydata(), [[10, 7], [12, 5]])
    np.testing.assert_array_equal(ct.get_xydata(), [[0, 8]])
    ticks = zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)
    shown = {int(tick): label.get_text() for tick, label in ticks}
    assert shown.pop(12) == "final"
    assert shown == {tick: str(tick) for tick in shown}
    assert plots.blocks({}, depth=12) is None


def test_a_comparison_has_a_dot_for_each_run_and_a_mean_for_each_group():
    tables = {
        "a0": {"mae": {"k-NN": 50.0}, "ct": {"k-NN": 60.0, "NMI": 9.0}, "ct - mae": {"k-NN": 10.0}},
        "a1": {"mae": {"k-NN": 52.0}, "ct": {"k-NN": 66.0}},
        "b": {"refine": {"k-NN": 70.0}},
    }
    colours = {"a0": "#ff0000", "a1": "#ff0000", "b": "#0000ff"}
    figure = plots.comparison(tables, {"a*": ["a0", "a1"], "b": ["b"]}, colours)
    knn, nmi = figure.axes
    assert [tick.get_text() for tick in knn.get_yticklabels()] == ["mae", "ct", "refine"]
    assert (knn.get_title(), nmi.get_title()) == ("k-NN", "NMI")
    drawn = [(x.get_marker(), *x.get_xydata()[0]) for x in knn.lines if x.get_marker() != "None"]
    assert drawn == [
        ("o", 50, 0), ("o", 52, 0), ("|", 51, 0),
        ("o", 60, -1), ("o", 66, -1), ("|", 63, -1), ("s", 70, -2),
    ]  # fmt: skip
    ((low, _), (high, _)) = knn.collections[1].get_segments()[0]
    np.testing.assert_allclose((low, high), (63 - 3 * 2**0.5, 63 + 3 * 2**0.5))
    assert [line.get_color() for line in knn.lines if line.get_marker() == "s"] == ["#0000ff"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a*", "b"]
    assert plots.comparison({"a": {}}, {"a": ["a"]}, {"a": "#ff0000"}) is None


def image(value):
    return np.full((2, 2, 1), value, np.uint8)


def test_neighbours_are_framed_if_they_have_the_label_of_the_image():
    def records(record):
        return {"image": image(record), "label": [0, 1, -1][record]}

    queries = [{"image": image(0), "label": label} for label in (0, -1)]
    found = {"ct 5": np.array([[0, 1, 2], [2, 0, -1]])}
    axes = np.array(sheets.neighbours(queries, found, records, "ab").axes).reshape(2, 5)
    assert [row[0].get_ylabel() for row in axes] == ["a", "unlabelled"]
    assert [[len(a.patches) for a in row[2:]] for row in axes] == [[1, 0, 0], [0, 0, 0]]
    assert axes[0, 2].images[0].get_array().max() == 0
    assert [text.get_text() for text in axes[1, 4].texts] == ["-"]


def test_montage_goes_from_the_centre_to_the_rim():
    found = {
        "distance": np.array([1.7, 1.3, 0.3, 1.0, 1.0]),
        "labels": np.array([1, 1, 0, 0, 0]),
        "clusters": np.array([1, 1, 1, 0, 0]),
        "index": np.array([10, 11, 13, 14, 15]),  # the third image, 12, could not be read
    }

    def records(record):
        return {"image": image(record)}

    axes = sheets.montage(found, records, ["cat", "dog"]).axes
    shown = [a.images[0].get_array().max() for a in axes[12:] if a.images]
    assert shown == [13, 11, 10]
    assert axes[12].get_ylabel() == "dog 67%\n3 images"
    assert axes[0].get_ylabel() == "cat 100%\n2 images"
    unlabelled = sheets.montage(found | {"labels": np.full(5, -1)}, records, []).axes
    assert [unlabelled[i].get_ylabel() for i in (0, 12)] == [
        "cluster 0\n2 images", "cluster 1\n3 images",
    ]  # fmt: skip


def test_the_choice_of_a_number_is_drawn_with_its_runners_up():
    values = {"excess": [0.1, 0.4, 0.2], "deviation": [0.01, 0.02, 0.01], "value": [0.0] * 3}
    selected = {"grid": [2, 4, 8], "score": [0.2, 1.0, 0.6], "chosen": 4, "runners_up": [8]}
    figure = plots.selection(selected | {"criteria": {"silhouette": values, "gap": values}})
    (axes,) = figure.axes
    *curves, chosen, other = axes.lines
    assert [line.get_label() for line in curves] == ["silhouette", "gap", "score"]
    assert curves[0].get_ydata().tolist() == [0.25, 1.0, 0.5]
    assert (chosen.get_xdata()[0], other.get_xdata()[0]) == (4, 8)
    assert chosen.get_linestyle() != other.get_linestyle()
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "4", "8"]
