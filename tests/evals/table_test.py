"""The table of the results, of one run and of several, and the paper's figures beside it."""

from maect_jax.evals import paper, table


def result(knn, acc):
    scores = {"acc": acc, "nmi": 0.5, "ari": 0.25}
    return {
        "knn": [{"k": 1, "accuracy": 0.0}, {"k": 10, "accuracy": knn}],
        "probe": {"best_last_epoch": {"top1": 0.75, "top5": 0.9}},
        "cluster": {"best": scores, "mean": scores, "deviation": scores},
    }


def full_result():
    """A row with every protocol."""
    full = result(0.5, 0.4)
    full["probe_augmented"] = full["probe"]
    full["cluster"]["best"]["ami"] = 0.3
    full["cluster"]["subsets"] = {"imagenet_dogs15": full["cluster"]}
    shots = [{"images_per_class": n} for n in (1, 2, 5)] + [{"share": s} for s in (0.01, 0.1)]
    full["lowshot"] = [shot | {"accuracy": 0.5} for shot in shots]
    return full


def test_several_runs_are_reported_by_mean_and_deviation():
    runs = [
        {"mae": result(0.5, 0.4), "ct": result(0.6, 0.5)},
        {"mae": result(0.52, 0.4), "ct": result(0.66, 0.6)},
    ]
    change = table.cells(runs[0])["ct - mae"]
    assert change == {
        "k-NN": "+10.0", "probe, centre crops": "+0.0", "k-means ACC": "+10.0",
        "mean of runs": "+10.0", "NMI": "+0.0", "ARI": "+0.0",
    }  # fmt: skip
    several = table.cells_of_several(dict(zip("ab", runs, strict=True)))
    assert list(several) == ["mae", "ct", "ct - mae"]
    # Unbiased: of 60 and 66 the deviation is 6 / sqrt(2).
    assert several["ct"]["k-NN"] == "63.0 +- 4.2"
    assert several["ct - mae"]["k-NN"] == "+12.0 +- 2.8"
    assert several["ct - mae"]["k-means ACC"] == "+15.0 +- 7.1"
    lines = table.text(several).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["percent", "mae", "ct", "ct", "-", "mae"]
    assert lines[-1].split()[0] == "ARI"


def test_different_numbers_of_clusters_are_not_compared():
    results = {"mae": result(0.5, 0.4), "ct": result(0.6, 0.5)}
    for row, clusters in (("mae", 6), ("ct", 20)):
        results[row]["cluster"]["clusters"] = clusters
    change = {"k-NN": "+10.0", "probe, centre crops": "+0.0"}
    assert table.cells(results)["ct - mae"] == change
    clusters = {row: {"cluster": part["cluster"]} for row, part in results.items()}
    assert list(table.cells(clusters)) == ["mae", "ct"]


def test_what_each_tuning_of_an_mae_has_changed_is_a_row():
    results = {"mae": result(0.5, 0.4), "refine_head": result(0.5, 0.4), "ct": result(0.6, 0.5)}
    rows = table.percentages(results | {"refine": result(0.75, 0.5)})
    assert [row for row in rows if table.is_difference(row)] == ["ct - mae", "refine - mae"]
    assert rows["refine - mae"]["k-NN"] == 25
    same = table.cells({"mae": result(0.5, 0.4), "ct": result(0.4999, 0.4)})
    assert same["ct - mae"]["k-NN"] == "+0.0"
    # The encoder under the heads is the MAE's.
    alone = {"refine_head": result(0.5, 0.4), "refine": result(0.75, 0.5)}
    assert table.percentages(alone)["refine - refine_head"]["k-NN"] == 25
    assert not any(map(table.is_difference, table.percentages({"refine": result(0.5, 0.4)})))


def test_what_a_run_lacks_are_rows_and_columns_of_another():
    good = {"mae": result(0.5, 0.4), "ct": result(0.6, 0.5)}
    assert table.lacking({"a": good, "b": good}) == {}
    assert table.lacking({"a": good, "b": {}}) == {"b": "mae, ct, ct - mae"}
    bare = {"cluster": {"skipped": "x"}, "knn": good["ct"]["knn"]}
    others = {"a": {"ct": good["ct"]}, "b": {"ct": bare, "pixels": bare}}
    assert table.lacking(others) == {
        "a": "pixels",
        "b": "ct (probe, centre crops, k-means ACC, mean of runs, NMI, ARI)",
    }


def test_a_figure_that_a_row_lacks_is_a_dash():
    bare = {"cluster": {"skipped": "x"}, "knn": [{"k": 1, "accuracy": 0.5}]}
    rows = table.cells(
        {"mae": result(0.5, 0.4), "finetune": {"finetune": {"top1": 0.8}}, "b": bare}
    )
    assert rows["finetune"] == {"fine-tuned": "80.0"}
    assert table.columns(rows)[-1] == "fine-tuned"
    lines = table.markdown(rows).splitlines()
    assert lines[:3] == [
        "| percent | mae | finetune | b |",
        "| --- | ---: | ---: | ---: |",
        "| k-NN | 50.0 | - | 50.0 |",
    ]
    assert lines[-1] == "| fine-tuned | - | 80.0 | - |"


def test_blocks_are_curves_and_no_columns():
    mae = result(0.5, 0.4)
    inner = {"3": result(0.6, 0.3), "0": {"knn": result(0.2, 0)["knn"]}}
    mae["cluster"]["best"]["silhouette"] = 0.1
    results = {"mae": mae | {"blocks": inner}, "ct": mae}
    assert table.cells(results) == table.cells({"mae": mae, "ct": mae})
    knn = {"final": 50.0, "3": 60.0, "0": 20.0}
    curves = {"k-NN": {"mae": knn}, "k-means ACC": {"mae": {"final": 40.0, "3": 30.0}}}
    assert table.by_block(results) == curves
    without = {"cluster": {"best": {"silhouette": 0.25}, "mean": {}}}
    assert table.by_block({"b": without | {"blocks": {"1": without}}}) == {
        "silhouette": {"b": {"final": 25.0, "1": 25.0}}
    }
    assert table.by_block({"mae": mae}) == {}


def test_the_papers_figures_are_for_imagenet_alone():
    wnids = [f"n{i:08}" for i in range(1000)]
    assert paper.is_imagenet(wnids)
    assert not paper.is_imagenet(wnids[:-1])
    assert not paper.is_imagenet([*wnids[:-1], "cat"])
    rows = paper.figures("H", 16)
    assert list(rows) == ["paper, MAE H/16", "paper, MAE-CT H/16", "paper, MAE-CT_aug H/16"]
    ours = table.cells({"ct": full_result()})["ct"]
    for row in rows.values():
        assert set(row) <= set(ours)  # under the names of our columns
    assert rows["paper, MAE-CT H/16"]["k-means ACC"] == "58.0"
    assert paper.figures("L", 16)["paper, MAE-CT_aug L/16"]["low-shot, 1 %"] == "74.2"
    refined = paper.figures("H", 14)["paper, MIM-Refiner H/14"]
    assert refined == {"linear probe": "83.7", "k-means ACC": "64.6"}
    assert paper.figures("Ti", 16) == {}
