"""The loggers of a run, each with its own package, which writes to files here."""

import importlib.machinery
import itertools
import json
import shutil
import struct
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import pipeline
from maect_jax.errors import PreemptedError, RunFailedError, UserError
from maect_jax.evals import table
from maect_jax.run import jsonl, writers
from tests.helpers import wandb_server
from tests.helpers.commands import QUICK, QUICK_SETTINGS
from tests.helpers.common import logger_at, run_on

REAL = ("tensorboard", "wandb", "mlflow")
# These libraries warn of each other, and of what comes.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(autouse=True)
def offline(store, tmp_path, monkeypatch):
    """Without a network or an account, and away from the home of who runs this."""
    monkeypatch.chdir(store)
    settings = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
        **{f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "CACHE", "DATA")},
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def tensorboard_points(run):
    """The points by metric, as steps and values, and the names of the images."""
    from tensorboardX.proto.event_pb2 import Event

    points, images = {}, set()
    for path in sorted((run / "tensorboard").glob("*/*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                if value.HasField("image") or value.metadata.plugin_data.plugin_name == "images":
                    images.add(value.tag)
                    continue
                number = value.simple_value
                if value.HasField("tensor"):  # as TensorFlow writes it
                    (number,) = value.tensor.float_val or struct.unpack(
                        "f", value.tensor.tensor_content
                    )
                name = f"{path.parent.name}/{value.tag}"
                points.setdefault(name, []).append((event.step, number))
    return points, images


def wandb_records(path):
    """What a file of wandb holds: blocks of LevelDB's log after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def wandb_points(run):
    """As `tensorboard_points`, of all files of a run together; and the exit statuses."""
    rows, summary, config, statuses, ids = [], {}, {}, [], set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            kinds = record.history.item, record.summary.update, record.run.config.update
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in itertools.chain(*kinds)
            }
            if record.HasField("history"):
                rows.append(items)
            summary |= items if record.HasField("summary") else {}
            if record.HasField("run"):
                config |= items
                ids.add(record.run.run_id)
            if record.HasField("exit"):
                statuses.append(record.exit.exit_code)
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))  # wandb takes no other
    points = {}
    for row in rows:
        for name, value in row.items():
            step = row.get(f"{name.partition('/')[0]}/step")
            points.setdefault(name, []).append((step, value))
    return points, summary, config, statuses, ids


def mlflow_run(run):
    import mlflow

    client = mlflow.MlflowClient()
    found = client.get_run(json.loads((run / "loggers" / "mlflow.json").read_text())["id"])
    history = {
        name: [(x.step, x.value) for x in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    images = {x.path for x in client.list_artifacts(found.info.run_id, "pictures")}
    return found, history, images


def points_of(logger, run):
    """The points by metric, as steps and values."""
    read = {"tensorboard": tensorboard_points, "wandb": wandb_points, "mlflow": mlflow_run}[logger]
    result = read(run)
    return result[1] if logger == "mlflow" else result[0]


def need(logger):
    pytest.importorskip("tensorboardX" if logger == "tensorboard" else logger)


def config_of(*loggers):
    return ConfigDict({"loggers": loggers, "ct": {"batch_size": 1}})


def trained(run, loggers, parts, error=None):
    """Trains parts of stages, `(stage, done, steps)`, then raises `error`."""
    with writers.opened(config_of(*loggers), run) as opened:
        for stage, done, steps in parts:
            opened.catch_up(stage, done)
            log = logger_at(run, done, 9, stage=stage, writers=opened)
            for step in steps:
                log.add(step, {"loss": step / 2, "finite": True, "action": 0}, None)
            log.flush()
            log.close()
        if error:
            raise error


def losses(run):
    return [line["loss"] for line in jsonl.read(run / "metrics.jsonl")]


@pytest.mark.parametrize("logger", REAL)
def test_each_step_of_each_stage_is_there_once_also_when_a_run_resumes(logger, tmp_path):
    need(logger)
    trained(tmp_path, (), [("mae", 0, range(1, 10)), ("ct", 0, range(1, 3))])  # without it
    stopped = [("mae", 9, ()), ("ct", 2, range(3, 7))]
    with pytest.raises(PreemptedError):
        trained(tmp_path, [logger], stopped, PreemptedError("a signal"))
    for path in tmp_path.glob("tensorboard/*/*"):  # named by the second
        path.rename(f"{path}.before")
    trained(tmp_path, [logger], [("mae", 9, ()), ("ct", 4, range(5, 10))])  # two come again
    assert losses(tmp_path) == [step / 2 for step in (*range(1, 10), *range(1, 10))]
    points = points_of(logger, tmp_path)
    once = [(step, step / 2) for step in range(1, 10)]
    assert points["mae/loss"] == points["ct/loss"] == once


def test_wandb_offline_counts_on_rows_that_are_in_its_file_by_now(tmp_path, monkeypatch):
    """A kill -9 loses the others, so that they come again."""
    need("wandb")
    monkeypatch.setattr(writers, "_DURABLE", 0)
    monkeypatch.setattr(writers.Wandb, "close", lambda self, _: self._run.finish())
    trained(tmp_path, ["wandb"], [("ct", 0, range(1, 6))])
    assert json.loads((tmp_path / "loggers" / "wandb.json").read_text())["row"] == 4


@pytest.mark.slow
def test_wandb_goes_on_with_the_row_that_its_server_lacks(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    with wandb_server.serving() as (address, rows, ends):
        wandb.teardown()  # it reads its settings once
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        stopped = [("mae", 0, range(1, 10)), ("ct", 0, range(1, 7))]
        with pytest.raises(PreemptedError):
            trained(tmp_path, ["wandb"], stopped, PreemptedError("a signal"))
        assert [row["_step"] for row in rows] == list(range(1, 16))
        del rows[-3:]  # a kill -9 before they were sent
        trained(tmp_path, ["wandb"], [("mae", 9, ()), ("ct", 4, range(5, 10))])
        assert [row["_step"] for row in rows] == list(range(1, 19))
        assert [(row["ct/step"], row["ct/loss"]) for row in rows[9:]] == [
            (step, step / 2) for step in range(1, 10)
        ]
        assert ends == [75, 0]
        wandb.teardown()


def test_the_run_stays_the_same_one_and_ends_as_it_ends(tmp_path, monkeypatch):
    need("wandb")
    need("mlflow")
    found = []
    for error in (PreemptedError("a signal"), KeyboardInterrupt(), RunFailedError("no"), None):
        part = ("ct", 2, ()) if found else ("ct", 0, range(1, 3))
        with pytest.raises(type(error)) if error else nullcontext():
            trained(tmp_path, ("wandb", "mlflow"), [part], error)
        found.append(mlflow_run(tmp_path)[0])
    assert [run.info.status for run in found] == ["KILLED", "KILLED", "FAILED", "FINISHED"]
    with monkeypatch.context() as patch:
        patch.setattr(writers.MLflow, "close", lambda *_: None)  # as a kill -9 leaves it
        trained(tmp_path, ["mlflow"], [part])
    assert mlflow_run(tmp_path)[0].info.status == "RUNNING"
    assert len({run.info.run_id for run in found}) == 1
    *_, config, statuses, ids = wandb_points(tmp_path)
    assert statuses == [75, 75, 1, 0]
    assert len(ids) == 1
    params = found[-1].data.params
    assert config["ct"]["batch_size"] == int(params["ct.batch_size"]) == 1
    assert config["workdir"] == params["workdir"] == str(tmp_path)


def test_mlflow_begins_a_new_run_where_it_lacks_the_old_one(tmp_path, caplog):
    need("mlflow")
    trained(tmp_path, ["mlflow"], [("ct", 0, range(1, 5))])
    path = tmp_path / "loggers" / "mlflow.json"
    path.write_text('{"id": "0123456789abcdef0123456789abcdef"}')
    trained(tmp_path, ["mlflow"], [("ct", 4, range(5, 10))])
    assert "has no run 0123456789abcdef0123456789abcdef" in caplog.text
    assert points_of("mlflow", tmp_path)["ct/loss"] == [(n, n / 2) for n in range(1, 10)]


def test_a_finished_run_is_watched_later_in_full(finished, tmp_path, monkeypatch, capsys):
    """All stages, results and pictures, by the pipeline."""
    for logger in REAL:
        need(logger)
    run = tmp_path / "run"
    shutil.copytree(finished.workdir, run)
    again = configs.load(QUICK, (*QUICK_SETTINGS, f"loggers={','.join(REAL)}"))
    run_on(monkeypatch, (1, 1), again, run, report=False)
    printed = capsys.readouterr().out
    assert [logger for logger in REAL if f"{logger}: " in printed] == list(REAL)
    lines = [line for line in jsonl.read(run / "metrics.jsonl") if "loss" in line]
    results = table.percentages(json.loads((run / "results.json").read_text()))
    events, shown = tensorboard_points(run)
    rows, summary, *_ = wandb_points(run)
    _, points, uploaded = mlflow_run(run)
    for stage in ("mae", "head", "ct"):
        expected = [(line["step"], line["loss"]) for line in lines if line["stage"] == stage]
        assert rows[f"{stage}/loss"] == points[f"{stage}/loss"] == expected
        assert events[f"{stage}/loss"] == [(n, pytest.approx(x)) for n, x in expected]
    accuracy = results["ct"]["k-NN"]
    assert summary["eval/ct/k-NN"] == points["eval/ct/k-NN"][0][1] == accuracy
    assert events["eval/ct/k-NN"] == [(0, pytest.approx(accuracy))]
    assert points["eval/mae/probe centre crops"][0][1] == results["mae"]["probe, centre crops"]
    pictures = {path.stem for path in (run / "pictures").glob("*.png")}
    assert "clusters" in pictures
    assert shown == pictures
    assert uploaded == {f"pictures/{name}.png" for name in pictures}
    assert {f"pictures/{name}/path" for name in pictures} <= rows.keys()


class Recorder(writers.Writer):
    """A logger that is out of order for its first `failures` calls."""

    needs = (("json",),)
    failures = 0
    gate = threading.Event()

    def __init__(self, config, folder):
        self.where, self.lines = "memory", []
        Recorder.last = self
        self._try()

    def _try(self):
        if Recorder.failures:
            Recorder.failures -= 1
            raise ConnectionError("no route\nto host")

    def add(self, line):
        self._try()
        self.lines.append((line.stage, line.step, line.values["loss"]))

    def close(self, status):
        self.gate.wait(10)
        self.status = status


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(writers.WRITERS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "failures", 0)
    monkeypatch.setattr(Recorder, "gate", threading.Event())
    Recorder.gate.set()
    return Recorder


def test_an_outage_is_a_warning_and_nothing_is_lost(recorder, tmp_path, caplog):
    trained(tmp_path, ["recorder"], [("ct", 0, range(1, 3))])
    recorder.failures = 3  # also when the run resumes
    trained(tmp_path, ["recorder"], [("ct", 2, range(3, 8))])
    assert recorder.last.lines == [("ct", step, step / 2) for step in range(1, 8)]
    assert recorder.last.status is writers.Status.FINISHED
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "recorder: cannot be written", "recorder: is written again",
    ]  # fmt: skip
    assert "ConnectionError: no route to host" in caplog.text
    assert losses(tmp_path) == [step / 2 for step in range(1, 8)]


@pytest.mark.parametrize("kind", ["never over", "hangs"])
def test_a_logger_that_does_not_come_back_does_not_keep_the_run(
    kind, recorder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(writers, "_PATIENCE", dict.fromkeys(writers.Status, 0.2))
    trained(tmp_path, ["recorder"], [("ct", 0, range(1, 3))])
    recorder.failures = 1000 * (kind == "never over")
    if kind == "hangs":
        recorder.gate.clear()
    trained(tmp_path, ["recorder"], [("ct", 2, range(3, 10))])
    assert "recorder: the end of this run is not written" in caplog.text
    assert losses(tmp_path) == [step / 2 for step in range(1, 10)]
    recorder.gate.set()


def test_a_new_run_does_not_begin_without_its_loggers(recorder, tmp_path):
    recorder.failures = 1
    with pytest.raises(UserError) as refused:
        trained(tmp_path, ["recorder"], [("ct", 0, range(1, 3))])
    assert str(refused.value) == (
        "config.loggers=('recorder',): recorder cannot start: ConnectionError: no route to host"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("processes", "limit"), [(1, "_START"), (2, "_START_OF_HOSTS")])
def test_a_new_run_does_not_wait_for_ever(processes, limit, recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_count", lambda: processes)
    monkeypatch.setattr(writers, limit, 0.1)
    monkeypatch.setattr(recorder, "_try", lambda self: self.gate.wait(10))
    recorder.gate.clear()
    with pytest.raises(UserError, match="recorder cannot start: TimeoutError: no answer within 0"):
        trained(tmp_path, ["recorder"], [])
    recorder.gate.set()


def test_only_the_first_process_has_loggers(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    with writers.opened(config_of("recorder"), tmp_path) as opened:
        assert opened.senders == ()


@pytest.mark.parametrize("command", [pipeline.dry_run, lambda c: pipeline.prepare(c, Path("no"))])
@pytest.mark.parametrize("logger", REAL)
def test_a_package_that_is_missing_is_one_line_before_anything_is_done(
    logger, command, tmp_path, monkeypatch
):
    # A folder of this name, as wandb makes one, is no package.
    folder = importlib.machinery.ModuleSpec(logger, loader=None)
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda _: folder)
    with pytest.raises(UserError, match=rf"'maect_jax\[{logger}\]'") as refused:
        command(configs.load(QUICK, [f"loggers={logger}"]))
    assert "\n" not in str(refused.value)


def test_config_of_an_earlier_version_keeps_its_events(tmp_path):
    config = configs.load(QUICK).to_dict()
    del config["loggers"]
    for had, loggers in ((True, ("tensorboard",)), (False, ())):
        (tmp_path / "config.json").write_text(json.dumps(config | {"tensorboard": had}))
        assert configs.read(tmp_path / "config.json").loggers == loggers
    with pytest.raises(UserError, match=r"is now --config\.loggers=tensorboard"):
        configs.load(QUICK, ["tensorboard=True"])
